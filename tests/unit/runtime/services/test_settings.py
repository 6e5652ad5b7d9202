from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from support.certificates import Authority
from support.services import half_library
from typer.testing import CliRunner

from recallseg import Bundle, Library
from recallseg.cli import app
from recallseg.engines.errors import (
    InputError,
    LibraryError,
    LibraryNotFoundError,
    OutputError,
)
from recallseg.runtime.services.checking import check_configuration
from recallseg.runtime.services.http.server import AnnotationServer, is_loopback
from recallseg.runtime.services.listening import connect, listen
from recallseg.runtime.services.logs import Marks, ServiceLog, configure_logs
from recallseg.runtime.services.metrics import Metrics, MetricsServer
from recallseg.runtime.services.questions import Questions
from recallseg.runtime.services.rules import Arriving, Rule, When, fitting
from recallseg.runtime.services.running import STOPPED_LATE, run_service
from recallseg.runtime.services.settings import EXAMPLES, example, read_configuration

RULE = '[[rules]]\nname = "a"\nlibrary = "lib"\n'


def written(folder: Path, text: str) -> Path:
    file = folder / "service.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.toml")), ids=lambda file: file.stem)
def test_examples_are_right_and_explain_every_setting_of_their_section(
    file: Path, tmp_path: Path
) -> None:
    (tmp_path / "conf.toml").write_text(example(file.stem))
    configuration = read_configuration(tmp_path / "conf.toml")
    section = getattr(configuration, file.stem)
    told = file.read_text()
    missing = [name for name in type(section).model_fields if not re.search(rf"\b{name}\b", told)]
    assert not missing
    assert section.host == "127.0.0.1"


def test_there_is_a_unit_and_a_containerfile() -> None:
    unit = (EXAMPLES / "recallseg-node.service").read_text()
    assert "Type=notify" in unit
    assert "recallseg node --config" in unit
    assert "recallseg" in (EXAMPLES / "Containerfile").read_text()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[node]\nprot = 104", "no setting 'node.prot'; did you mean 'node.port'?"),
        ("[nod]\nport = 104", "no setting 'nod'; did you mean 'node'?"),
        (RULE + "structure = ['x']", "'rules[1].structure'; did you mean 'rules[1].structures'?"),
        (RULE + "when = {modalty = 'MR'}", "did you mean 'rules[1].when.modality'?"),
        (RULE + "[rules.recipe]\nkk = 4", "did you mean 'rules[1].recipe.k'?"),
        (
            "[node.destinations.pacs]\ntype = 'dicom'\nhst = 'x'\nhost='y'\nport=1\nae_title='A'",
            "hst'; did you mean 'node.destinations.pacs.host'?",
        ),
        ("[node.destinations.pacs]\ntype = 'ftp'", "node.destinations.pacs"),
        ("[node]\nport = 70000", "node.port: Input should be less than or equal to 65535, got 700"),
        ("[node]\nae_title = 'A TITLE THAT IS TOO LONG'", "1 to 16 printable"),
        ("[[rules]]\nname = 'a'", "'rules[1].library' is missing"),
        (RULE + RULE, "two rules are named 'a'"),
        (RULE + "destinations = ['pacs']", "there is no node.destinations.pacs"),
        ("[node", "no TOML"),
        ("[node]\nwibble = 1", "known are"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InputError) as failure:
        read_configuration(written(tmp_path, text))
    assert told in str(failure.value)


def test_all_that_is_wrong_is_told_at_once_and_no_secret_is(tmp_path: Path) -> None:
    text = (
        "stop_s = -1\n[node]\nport = 'x'\n[node.destinations.p]\ntype='stow-rs'\nurl='http://a'\n"
    )
    with pytest.raises(InputError) as failure:
        read_configuration(written(tmp_path, text + "password_file = 7\n"))
    told = str(failure.value)
    assert "stop_s" in told
    assert "node.port" in told
    assert "got 7" not in told
    with pytest.raises(InputError, match="cannot be read"):
        read_configuration(tmp_path / "none.toml")


def test_paths_are_meant_from_the_file_and_the_environment_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, "[node]\nport = 104\nquiet_s = 2\n" + RULE)
    monkeypatch.setenv("RECALLSEG__NODE__PORT", "11113")
    configuration = read_configuration(file)
    assert configuration.node is not None
    assert (configuration.node.port, configuration.node.quiet_s) == (11113, 2)
    assert configuration.rules[0].library == tmp_path / "lib"
    monkeypatch.setenv("RECALLSEG__NOED__PORT", "1")
    with pytest.raises(InputError, match=r"RECALLSEG__NOED__PORT.*did you mean 'node'"):
        read_configuration(file)


@pytest.mark.parametrize(
    ("when", "fits"),
    [
        ({}, True),
        ({"modality": "mr"}, True),
        ({"modality": ["CT", "M?"]}, True),
        ({"modality": "M"}, False),
        ({"series_description": "*T2*TSE*"}, True),
        ({"series_description": "t2"}, False),
        ({"sender": "SCANNER*"}, True),
        ({"sender": "PACS"}, False),
        ({"body_part": "HEAD"}, False),
        ({"parameters": {"protocol": "liver*"}}, True),
        ({"parameters": {"protocol": "liver*", "other": "x"}}, False),
        ({"modality": "MR", "called": "RECALLSEG"}, True),
    ],
)
def test_rules_fit_what_they_say(when: dict[str, object], fits: bool) -> None:
    arriving = Arriving(
        modality="MR",
        series_description="ax t2_tse fs",
        senders=("ROUTER", "scanner1"),
        called="RECALLSEG",
        parameters={"protocol": "Liver 2"},
    )
    rule = Rule(name="a", library=Path("lib"), when=When(**when))  # type: ignore[arg-type]
    assert (fitting([rule], arriving) == (rule,)) is fits


def test_config_check_tells_what_is_not_there(tmp_path: Path, fake_bundle: Bundle) -> None:
    half_library(tmp_path / "lib", fake_bundle)
    good = 'state = "s"\n' + RULE + 'destinations = ["pacs"]\n[node]\n[node.destinations.pacs]\n'
    good += "type='dicom'\nhost='127.0.0.1'\nport=1\nae_title='A'\n"
    done = CliRunner().invoke(app, ["config", "check", str(written(tmp_path, good))])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "s").exists()  # a check writes nothing
    bad = good.replace('"lib"', '"gone"') + "[audit]\nlog = 'none/log'\n"
    bad += "[node.tls]\ncertificate = 'c.pem'\nkey = 'k.pem'\nauthorities = 'a.pem'\n"
    done = CliRunner().invoke(app, ["config", "check", str(written(tmp_path, bad)), "--json"])
    assert done.exit_code == 1
    told = json.loads(done.stdout)["problems"]
    assert [
        word for word in ("rule 'a'", "audit.log", "node.tls") if not any(word in p for p in told)
    ] == []
    asks = good.replace("destinations", "structures = ['liver']\ndestinations", 1)
    done = CliRunner().invoke(app, ["config", "check", str(written(tmp_path, asks))])
    assert "no exemplar of 'liver'; it knows half" in done.output


def test_config_example_prints_one_that_is_right() -> None:
    done = CliRunner().invoke(app, ["config", "example", "node"])
    assert done.stdout == (EXAMPLES / "node.toml").read_text()
    assert CliRunner().invoke(app, ["config", "example", "fax"]).exit_code == 1


def test_marks_need_the_key(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "keys" / "marks")
    assert marks.of("1.2.3") == Marks(tmp_path / "keys" / "marks").of("1.2.3")
    assert marks.of("1.2.3") != Marks(tmp_path / "other").of("1.2.3")
    assert (tmp_path / "keys" / "marks").stat().st_mode & 0o077 == 0
    (tmp_path / "bad").write_bytes(b"short")
    with pytest.raises(InputError, match="no key"):
        Marks(tmp_path / "bad")


def test_logs_are_structured_and_tell_of_an_error_its_kind_only() -> None:
    stream = StringIO()
    configure_logs("json", "info", stream)
    log = ServiceLog("node")
    log.info("received", objects=3)
    log.error("failed", error=ValueError("Doe^Jane has no liver"))
    log.debug("nothing")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["event"], first["objects"], first["level"]) == ("received", 3, "info")
    assert second["error"] == "ValueError"
    assert "Doe" not in stream.getvalue()
    configure_logs("text", "info", stream)
    log.info("received", objects=4)
    assert stream.getvalue().endswith("node: received objects=4\n")


def test_metrics_and_health_over_http() -> None:
    metrics = Metrics("node")
    metrics.refused("space")
    metrics.queue("waiting", 3)
    with metrics.stage("segment"):
        pass
    waits, lives = ["the library"], [True]
    metrics.ready_when("rules", lambda: waits[0])
    metrics.alive_while("worker", lambda: lives[0])
    server = MetricsServer(metrics, "127.0.0.1", 0)

    def get(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}") as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    try:
        status, text = get("/metrics")
        assert status == 200
        assert 'recallseg_refusals_total{reason="space",service="node"} 1.0' in text
        assert 'recallseg_stage_seconds_count{service="node",stage="segment"} 1.0' in text
        assert get("/healthz")[0] == 200
        assert get("/readyz") == (503, '{"waits_for": {"rules": "the library"}}')
        waits[0], lives[0] = "", False
        assert get("/readyz")[0] == 200
        assert get("/healthz") == (503, '{"dead": ["worker"]}')
        assert get("/etc/passwd")[0] == 404
        with pytest.raises(OutputError, match="cannot be served"):
            MetricsServer(metrics, "127.0.0.1", server.port)
    finally:
        server.close()


class Sleeper:
    """A service that gets a signal as soon as it runs."""

    def __init__(self) -> None:
        self.log = list[str]()

    def start(self) -> None:
        self.log.append("start")

    def alive(self) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    def stop(self, seconds: float) -> None:
        self.log.append("stop")


def test_sigterm_stops_a_service_and_systemd_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        monkeypatch.chdir(tmp_path)  # a socket's name may have 107 bytes, a folder's more
        systemd.bind("notify")
        systemd.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", "notify")
        service = Sleeper()
        assert run_service(service, "node", stop_s=300)
        assert service.log == ["start", "stop"]
        told = [systemd.recv(100).decode() for _ in range(2)]
        assert told[0] == "READY=1"
        assert "STOPPING=1" in {
            told[1],
            systemd.recv(100).decode() if told[1] != "STOPPING=1" else "",
        }


LATE = """
import sys, time
sys.path.insert(0, {tests!r})
from recallseg.runtime.services.running import run_service
class Stuck:
    def start(self): print("up", flush=True); {then}
    def alive(self): return True
    def stop(self, seconds): time.sleep(3600)
run_service(Stuck(), "node", stop_s=0.5)
"""


@pytest.mark.parametrize("then", ["pass", "raise OSError('no port')"])
def test_a_service_that_does_not_stop_is_cut_off(then: str) -> None:
    tests = str(Path(__file__).parents[3])
    with subprocess.Popen(
        [sys.executable, "-c", LATE.format(tests=tests, then=then)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.terminate()
        assert process.wait(300) == STOPPED_LATE


def rule_of(folder: Path, **fields: object) -> Rule:
    recipe = {"k": 1, "engine": "fake"}
    return Rule.model_validate({"name": "a", "library": folder, "recipe": recipe, **fields})


def test_a_library_that_changes_between_two_questions_is_seen(
    tmp_path: Path, fake_bundle: Bundle
) -> None:
    folder = half_library(tmp_path / "lib", fake_bundle)
    questions = Questions()
    rule = rule_of(folder)

    def structures() -> tuple[str, ...]:
        with questions.ask(rule) as segmenter:
            return segmenter.structures

    with questions.ask(rule) as first, questions.ask(rule) as second:
        assert second is first
        image, masks = first.library.source(next(iter(first.library)).key)
    with Library.open(folder, mode="write", engine="fake") as library:
        library.add(image + 1, {"other": masks["half"]})
    assert structures() == ("half", "other")
    folder.rename(tmp_path / "away")
    with pytest.raises(LibraryNotFoundError):
        structures()
    half_library(folder, fake_bundle, "third")  # another library in its place
    assert structures() == ("third",)
    with questions.ask(rule) as third:
        (tmp_path / "lib").rename(tmp_path / "gone")
        (tmp_path / "away").rename(folder)  # replaced while in use
        assert structures() == ("half", "other")
        assert third.segment(image).masks["third"].any()  # what is under way is not disturbed
    with pytest.raises(LibraryError, match="has been closed"):
        third.segment(image)
    with questions.ask(rule_of(tmp_path / "gone", name="b")) as twin, questions.ask(rule) as one:
        assert twin.model is one.model  # one model for rules of one kind
    questions.close()
    assert twin.model.closed


@pytest.mark.parametrize(
    ("text", "environment", "why"),
    [
        ("", {"RECALLSEG__RULES": "half"}, "RECALLSEG__RULES one is no JSON"),
        ("", {"RECALLSEG__NODE__SENDERS": "MR"}, "RECALLSEG__NODE__SENDERS one is no JSON"),
        ("", {"RECALLSEG__NODE": "[" * 100_000}, "RECALLSEG__NODE one is no JSON"),
        ("a = " + "[" * 5000, {}, "is no TOML"),
        ('_env_prefix = "X"\n_cli_parse_args = true', {}, "there is no setting '_env_prefix'"),
        ('state = "~nobody-of-this-name/state"', {}, "no home folder '~nobody-of-this-name'"),
        ('state = "a\\u0000b"', {}, "a path has no NUL"),
        ('[metrics]\nhost = ""', {}, "metrics.host: no host can be called ''"),
        (f'[igtl]\nhost = "{"a" * 64}"', {}, "igtl.host: no host can be called 'aaa"),
    ],
)
def test_whatever_a_configuration_holds_is_told_as_its_fault(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    environment: dict[str, str],
    why: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=rf"service\.toml.*{re.escape(why)}"):
        read_configuration(written(tmp_path, text))


STOW = 'state = "s"\n[node]\n[node.destinations.pacs]\ntype = "stow-rs"\nurl = "https://pacs/"\n'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('user = "us"', "user and password_file go together"),
        ('password_file = "word"', "user and password_file go together"),
        ('user = "us"\npassword_file = "word"\ntoken_file = "word"', "not both"),
        ('key = "k.pem"', "a key goes with its certificate"),
    ],
)
def test_what_a_destination_would_leave_out_without_a_word_is_refused(
    tmp_path: Path, text: str, why: str
) -> None:
    with pytest.raises(InputError, match=rf"destinations\.pacs.*{why}"):
        read_configuration(written(tmp_path, STOW + text))


def problems_of(folder: Path, text: str) -> str:
    return "\n".join(check_configuration(read_configuration(written(folder, text))))


def test_each_file_of_a_destination_is_looked_at_and_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    told = problems_of(tmp_path, f'{STOW}user = "us"\npassword_file = "gone"')
    assert f"destinations.pacs: {tmp_path}/gone cannot be read: No such file" in told
    assert f"{tmp_path}/empty is empty" in problems_of(tmp_path, f'{STOW}token_file = "empty"')
    told = problems_of(tmp_path, f'{STOW}authorities = "gone.pem"')
    assert f"destinations.pacs: {tmp_path}/gone.pem cannot be read" in told


def test_whatever_is_wrong_with_a_certificate_is_told_by_its_file(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("node")
    other = authority.issue("other")[1]
    (tmp_path / "junk.pem").write_text("junk")
    secret = load_pem_private_key(key.read_bytes(), None).private_bytes(
        Encoding.PEM, PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(b"word")
    )
    (tmp_path / "secret.key").write_bytes(secret)

    def told(key: Path, authorities: Path) -> str:
        text = f'state = "s"\n[node.tls]\ncertificate = "{certificate}"\nkey = "{key}"\n'
        return problems_of(tmp_path, f'{text}authorities = "{authorities}"')

    assert "node.tls" not in told(key, authority.file)
    assert f"node.tls: {tmp_path}/gone cannot be read" in told(tmp_path / "gone", authority.file)
    assert f"node.tls: {tmp_path}/gone cannot be read" in told(key, tmp_path / "gone")
    assert f"{tmp_path}/junk.pem holds no certificate" in told(key, tmp_path / "junk.pem")
    assert "belong together" in told(other, authority.file)
    # OpenSSL would ask for the passphrase on the terminal, and wait.
    assert f"the key in {tmp_path}/secret.key is enc" in told(
        tmp_path / "secret.key", authority.file
    )


@pytest.mark.parametrize("host", ["a" * 64, "a..b", "", "no host"])
def test_what_no_host_can_be_called_is_no_defect(host: str) -> None:
    with pytest.raises(InputError, match="there is no address"):
        listen(host, 0, "--port")
    with pytest.raises(InputError, match="there is no address"):
        is_loopback(host)
    with pytest.raises(OSError, match=r"."):
        connect(host, 1, 1.0)


def test_metrics_are_served_by_ipv6_too() -> None:
    try:
        with socket.socket(socket.AF_INET6) as own:
            own.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    server = MetricsServer(Metrics("test"), "::1", 0)
    try:
        assert urllib.request.urlopen(f"http://[::1]:{server.port}/healthz").status == 200
    finally:
        server.close()


def test_a_client_of_metrics_that_fails_is_told_by_the_kind_of_its_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    metrics = Metrics("test")
    metrics.ready_when("x", lambda: str(1 // 0))
    server, told = MetricsServer(metrics, "127.0.0.1", 0), StringIO()
    configure_logs(stream=told)
    try:
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/readyz")
    finally:
        server.close()
        configure_logs()
    assert "ZeroDivisionError" in told.getvalue()
    assert capfd.readouterr().err == ""  # a traceback would hold what was sent


def test_a_server_that_cannot_start_says_why_and_listens_no_more() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise RuntimeError("can't start new thread")

    server = AnnotationServer(application, port=0)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="did not start: RuntimeError: can't start new thread"):
        server.start()
    server.stop()
    listen("127.0.0.1", server.port, "--port").close()
