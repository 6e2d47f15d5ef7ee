"""compose.yaml and what it mounts: nothing that the code, the images or the tools do not know."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from serve.settings import PREFIX, ServeConfig, read_config

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "compose.yaml").read_text()
FILE = yaml.safe_load(TEXT)
SERVICES = FILE["services"]
PROMETHEUS = yaml.safe_load((ROOT / "deploy" / "compose" / "prometheus.yaml").read_text())
GRAFANA = ROOT / "deploy" / "compose" / "grafana"


def mounts(service):
    """{path in the container: path here, or name of a volume}, variables at their defaults."""
    found = {}
    for one in SERVICES[service]["volumes"]:
        if isinstance(one, str):
            plain = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", one)
            source, target, *_ = plain.split(":")
            found[target] = source
        else:
            found[one["target"]] = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", one["source"])
    return found


def published(service):
    """{port in the container: address it is published at}, variables at their defaults."""
    plain = (re.sub(r"\$\{\w+:-(.*?)\}", r"\1", one) for one in SERVICES[service]["ports"])
    return {int(target): address for address, _, target in (one.split(":") for one in plain)}


@pytest.mark.parametrize("name", SERVICES)
def test_services_may_do_little(name):
    service = SERVICES[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"] and service["restart"] == "unless-stopped"
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+", service["image"]), "a version, and never latest"
    assert all(address == "127.0.0.1" for address in published(name).values()) if "ports" in service else True


def test_the_server_is_the_image_of_this_version_as_its_user():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert SERVICES["weakseg"]["image"] == f"weakseg/serve-cpu:{version}"
    dockerfile = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    assert f"USER {SERVICES['weakseg']['user']}\n" in dockerfile
    (folder,) = mounts("weakseg")
    assert f'CMD ["serve", "--models", "{folder}"]' in dockerfile
    assert SERVICES["weakseg"]["volumes"][0]["read_only"] is True


def test_settings_and_ports_are_those_of_the_server(monkeypatch):
    for name, value in SERVICES["weakseg"]["environment"].items():
        assert name.startswith(PREFIX)
        monkeypatch.setenv(name, value)
    config = read_config()
    assert {str(config.models)} == mounts("weakseg").keys(), "`weakseg doctor` in the container looks there"
    assert published("weakseg").keys() == {config.port, config.metrics_port}
    assert PROMETHEUS["scrape_configs"][0]["static_configs"] == [{"targets": [f"weakseg:{config.metrics_port}"]}]
    grace_s = int(SERVICES["weakseg"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > config.drain_delay_s + config.drain_grace_s
    (size,) = re.findall(r"MEMORY:-(\d+)g", SERVICES["weakseg"]["mem_limit"])
    assert int(size) * 1024 > 2 * config.image_memory_mib


def test_flags_that_comments_name_are_the_servers():
    named = {flag.replace("-", "_") for flag in re.findall(r"--((?:drain|tracing)[\w-]*)", TEXT)}
    assert named and named <= ServeConfig.model_fields.keys()


def test_what_is_mounted_is_there():
    for name in SERVICES:
        for source in mounts(name).values():
            if source.startswith("./") and not source.startswith("./runs"):
                assert (ROOT / source).exists(), source
            else:
                assert source.startswith("./runs") or source in FILE["volumes"], source


def test_prometheus_reads_what_is_mounted_and_scrapes_what_there_is(tmp_path):
    inside = mounts("prometheus")
    (config,) = re.findall(r"--config.file=(\S+)", " ".join(SERVICES["prometheus"]["command"]))
    assert ROOT / inside[config] == ROOT / "deploy" / "compose" / "prometheus.yaml"
    assert [ROOT / inside[path] for path in PROMETHEUS["rule_files"]] == [ROOT / "deploy" / "monitoring" / "rules.yaml"]
    (data,) = re.findall(r"--storage.tsdb.path=(\S+)", " ".join(SERVICES["prometheus"]["command"]))
    assert inside[data] in FILE["volumes"]
    hosts = {target.partition(":")[0] for target in PROMETHEUS["scrape_configs"][0]["static_configs"][0]["targets"]}
    hosts |= set(PROMETHEUS["scrape_configs"][1]["dns_sd_configs"][0]["names"])
    assert hosts <= SERVICES.keys()
    assert PROMETHEUS["scrape_configs"][0]["job_name"] == "weakseg", "the rules ask for it"


def test_promtool_reads_the_configuration(tmp_path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    text = (ROOT / "deploy" / "compose" / "prometheus.yaml").read_text()
    for path in PROMETHEUS["rule_files"]:
        text = text.replace(path, str(ROOT / mounts("prometheus")[path]))
    (tmp_path / "prometheus.yaml").write_text(text)
    done = subprocess.run(
        [promtool, "check", "config", tmp_path / "prometheus.yaml"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_grafana_finds_its_data_and_its_dashboards():
    inside = mounts("grafana")
    assert ROOT / inside["/etc/grafana/provisioning"] == GRAFANA
    (source,) = yaml.safe_load((GRAFANA / "datasources" / "prometheus.yaml").read_text())["datasources"]
    (listens,) = published("prometheus")
    assert source["type"] == "prometheus" and source["url"] == f"http://prometheus:{listens}" and source["isDefault"]
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((GRAFANA / "dashboards" / "weakseg.yaml").read_text())["providers"]
    folder = ROOT / inside[provider["options"]["path"]]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (folder / Path(home).name).exists() and Path(home).parent == Path(provider["options"]["path"])
    assert json.loads((folder / Path(home).name).read_text())["uid"] == "weakseg-service"


def test_every_variable_is_explained_at_the_top():
    head = TEXT.partition("\nname:")[0]
    used = set(re.findall(r"\$\{(\w+)", TEXT))
    assert used == set(re.findall(r"^#   ([A-Z_]+) ", head, re.MULTILINE))


def test_compose_reads_it():
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], check=False, capture_output=True).returncode:
        pytest.skip("docker compose is not installed: https://docs.docker.com/compose/install/")
    env = os.environ | {"GRAFANA_PASSWORD": "password"}
    done = subprocess.run(
        [docker, "compose", "--profile", "batch", "config", "--quiet"],
        check=False,
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
