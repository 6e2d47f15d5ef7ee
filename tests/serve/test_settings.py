import dataclasses
from pathlib import Path

import pytest

from serve.settings import ServeConfig, config_from_env
from weakseg.errors import ConfigError


def test_the_environment_overrides_defaults():
    config = config_from_env(
        {
            "WEAKSEG_PORT": "0",
            "WEAKSEG_MAX_DELAY_MS": "0.5",
            "WEAKSEG_REFLECTION": "true",
            "WEAKSEG_THREADS": "2",
            "WEAKSEG_PROVIDER": "cuda",
            "WEAKSEG_MODELS": "/models",
            "WEAKSEG_BUNDLE": "a/1:b/2",
            "WEAKSEG_LOG_FORMAT": "text",
            "PORT": "1",
        }
    )
    assert config == ServeConfig(
        port=0,
        max_delay_ms=0.5,
        reflection=True,
        threads=2,
        provider="cuda",
        models=Path("/models"),
        bundle=(Path("a/1"), Path("b/2")),
        log_format="text",
    )
    assert config_from_env({}) == ServeConfig()


def test_every_field_can_come_from_the_environment():
    for field in dataclasses.fields(ServeConfig):
        default = getattr(ServeConfig(), field.name)
        special = {"bundle": "", "models": "x", "threads": "1", "public_key": "x", "provider": "cpu"}
        text = special.get(field.name, str(default))
        changed = config_from_env({f"WEAKSEG_{field.name.upper()}": text})
        assert str(getattr(changed, field.name)) == (text if text else "()")


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("PORT", "eight", "WEAKSEG_PORT must be int, got 'eight'"),
        ("THREADS", "2.5", "WEAKSEG_THREADS must be int"),
        ("REFLECTION", "yes", "WEAKSEG_REFLECTION must be true or false"),
        ("LOG_LEVEL", "loud", "WEAKSEG_LOG_LEVEL must be one of debug, info"),
        ("MAX_BATCH", "0", "max_batch must be at least 1"),
    ],
)
def test_bad_variables(variable, text, message):
    with pytest.raises(ConfigError, match=message):
        config_from_env({f"WEAKSEG_{variable}": text})


@pytest.mark.parametrize(
    "fields",
    [{"port": 65536}, {"metrics_port": -1}, {"queue_limit": 0}, {"threads": 0}, {"max_message_bytes": 2**31}],
)
def test_impossible_values(fields):
    (name,) = fields
    with pytest.raises(ConfigError, match=name):
        ServeConfig(**fields)
