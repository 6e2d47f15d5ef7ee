import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from serve.settings import ServeConfig, read_config, toml_from_config
from weakseg.errors import ConfigError


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for variable in [name for name in os.environ if name.startswith("WEAKSEG_")]:
        monkeypatch.delenv(variable)


@pytest.fixture
def variables(monkeypatch):
    """A function that sets variables, without their prefix."""
    return lambda **values: [monkeypatch.setenv(f"WEAKSEG_{name}", value) for name, value in values.items()]


@pytest.fixture
def settings_file(tmp_path):
    def write(text):
        path = tmp_path / "weakseg.toml"
        path.write_text(text)
        return path

    return write


def test_the_environment_overrides_the_file_and_this_the_defaults(variables, settings_file):
    variables(PORT="0", REFLECTION="true", THREADS="2", MODELS="/models", BUNDLE="a/1:b/2", LOG_FORMAT="text")
    path = settings_file('port = 1\nmax_delay_ms = 0.5\nbundle = ["c/3"]\nprovider = "cuda"\n')
    expected = ServeConfig(
        port=0,
        max_delay_ms=0.5,
        reflection=True,
        threads=2,
        provider="cuda",
        models=Path("/models"),
        bundle=(Path("a/1"), Path("b/2")),
        log_format="text",
    )
    assert read_config(path) == expected
    variables(CONFIG=str(path))
    assert read_config() == expected


def test_without_any_of_them_there_are_the_defaults_and_a_config_reads_none(variables):
    assert read_config() == ServeConfig()
    variables(PORT="1")
    assert ServeConfig().port == 8500


def test_all_unknown_variables_are_told_at_once(variables):
    variables(MAX_BACH="1", PORTT="1")
    with pytest.raises(ConfigError, match="WEAKSEG_MAX_BACH: .*; unknown environment variable WEAKSEG_PORTT: "):
        read_config()


def test_every_field_can_come_from_the_environment(monkeypatch):
    special = {"bundle": "", "threads": "1", "refine_threads": "1", "provider": "cpu", "warm_up": "", "admin_port": "1"}
    paths = [name for name, field in ServeConfig.model_fields.items() if field.annotation == Path | None]
    special |= dict.fromkeys(paths, "x")
    together = {"tls_cert": {"tls_key"}, "tls_key": {"tls_cert"}, "tls_client_ca": {"tls_cert", "tls_key"}}
    together["tokens"] = together["tls_client_ca"]
    for field in ServeConfig.model_fields:
        text = special.get(field, str(getattr(ServeConfig(), field)))
        with monkeypatch.context() as patch:
            patch.setenv(f"WEAKSEG_{field.upper()}", text)
            for other in together.get(field, ()):
                patch.setenv(f"WEAKSEG_{other.upper()}", "y")
            assert str(getattr(read_config(), field)) == (text if text else "()")


def test_what_is_printed_can_be_read_again(settings_file):
    config = ServeConfig(bundle=("a/1", 'b "quoted"\\2'), host="::", max_delay_ms=0.25, models="m", reflection=True)
    assert read_config(settings_file(toml_from_config(config))) == config


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("PORT", "eight", "^WEAKSEG_PORT must be a valid integer.*, got 'eight'$"),
        ("THREADS", "2.5", "^WEAKSEG_THREADS must be a valid integer"),
        ("REFLECTION", "perhaps", "^WEAKSEG_REFLECTION must be a valid boolean"),
        ("LOG_LEVEL", "loud", "^WEAKSEG_LOG_LEVEL must be 'debug', 'info', 'warning' or 'error', got 'loud'$"),
        ("MAX_BATCH", "0", "^WEAKSEG_MAX_BATCH must be at least 1, got '0'$"),
        ("MAX_BACH", "1", "^unknown environment variable WEAKSEG_MAX_BACH: did you mean WEAKSEG_MAX_BATCH"),
        ("CONFIG", "/no/such.toml", "^expected a TOML file of settings at /no/such.toml, got: .*No such file"),
    ],
)
def test_bad_variables(variables, variable, text, message):
    variables(**{variable: text})
    with pytest.raises(ConfigError, match=message):
        read_config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port = 70000", r"weakseg.toml: port must be less than or equal to 65535, got 70000$"),
        ("prot = 1", r"weakseg.toml: unknown key 'prot': did you mean port\?$"),
        ("zzz = 1", r"weakseg.toml: unknown key 'zzz': `weakseg serve --help` lists"),
        ("port = ", r"^expected a TOML file of settings at .*weakseg.toml, got: Invalid value"),
    ],
)
def test_bad_files(settings_file, text, message):
    with pytest.raises(ConfigError, match=message):
        read_config(settings_file(text))


def test_what_kubernetes_says_of_a_service_of_our_name_is_no_setting(variables, settings_file):
    variables(PORT="tcp://10.0.0.1:8500", SERVICE_HOST="10.0.0.1", SERVICE_PORT="8500", SERVICE_PORT_GRPC="8500")
    variables(PORT_8500_TCP="tcp://10.0.0.1:8500", PORT_8500_TCP_ADDR="10.0.0.1", METRICS_PORT="tcp://10.0.0.2:9464")
    assert read_config(settings_file("port = 9000")) == ServeConfig(port=9000)


@pytest.mark.parametrize(
    "fields",
    [
        {"warm_up": ("500",)},
        {"warm_up": ("0x10",)},
        {"load_policy": "keep"},
        {"port": 65536},
        {"metrics_port": -1},
        {"queue_limit": 0},
        {"bulk_share": 0.0},
        {"bulk_share": 1.1},
        {"bulk_wait_s": -1.0},
        {"threads": 0},
        {"max_message_bytes": 2**31},
        {"x": 1},
    ],
)
def test_impossible_values(fields):
    (name,) = fields
    with pytest.raises(ValidationError, match=name):
        ServeConfig(**fields)
