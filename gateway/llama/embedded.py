"""
llama.cpp's own server from the ``xllamacpp`` wheel, as a command.

``python -m gateway.llama.embedded --model FILE --port N`` is a llama-server for machines that have
none: the same C++ server behind the same endpoints, nothing to compile.  It takes llama-server's
own names for its options and refuses any other by name.  ``--model package:NAME`` takes the model
that a Python package of that name carries.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

_POOLINGS: Final = ("unspecified", "none", "mean", "cls", "last", "rank")
_REASONING_FORMATS: Final = ("none", "auto", "deepseek", "deepseek-legacy")


def parser() -> argparse.ArgumentParser:
    """The command line; names and meanings are llama-server's."""
    options = argparse.ArgumentParser(
        prog="python -m gateway.llama.embedded", allow_abbrev=False, add_help=True
    )
    add = options.add_argument
    add("-m", "--model", required=True, help="a GGUF file, or package:NAME")
    add("--host", default="127.0.0.1", help="an address, or a path that ends in .sock")
    add("--port", type=int, default=8080)
    add("-c", "--ctx-size", type=int, default=0, help="tokens, over all slots; 0: the model's own")
    add("-np", "--parallel", type=int, default=1, help="slots")
    add("-b", "--batch-size", type=int, default=2048)
    add("-ub", "--ubatch-size", type=int, default=512)
    add("-t", "--threads", type=int, default=0, help="0: half of the cores")
    add("-a", "--alias", default="", help="the model's name")
    add("--jinja", action="store_true", help="always on here")
    add("--chat-template-file", type=Path)
    add("--slot-save-path", type=Path)
    add("-sps", "--slot-prompt-similarity", type=float, default=0.1)
    add("-cram", "--cache-ram", type=int, default=8192, help="MiB; 0: none, -1: no limit")
    add("--sse-ping-interval", type=int, default=30, help="seconds")
    add("--swa-full", action="store_true")
    add("--api-key", default=os.environ.get("LLAMA_API_KEY", ""))
    add("--metrics", action="store_true")
    add("--reasoning-format", choices=_REASONING_FORMATS, default="deepseek")
    add("-r", "--reverse-prompt", action="append", default=[], help="ends an answer; repeatable")
    add("--repeat-penalty", type=float, default=1.0)
    add("--embeddings", action="store_true")
    add("--pooling", choices=_POOLINGS, default="unspecified", help="unspecified: the model's own")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server until SIGTERM or SIGINT; the exit status is llama-server's."""
    options = parser().parse_args(arguments)
    try:
        import xllamacpp
    except ImportError:
        print("xllamacpp is not installed: pip install 'claudegw[demo]'", file=sys.stderr)
        return 1
    try:
        params = parameters(xllamacpp, options)
    except (OSError, ImportError) as error:
        print(f"embedded: {error}", file=sys.stderr)
        return 1
    # Blocked before the server's threads are made, the signals wait for sigwait() below.
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        print(f"embedded: {error}", file=sys.stderr)
        return 1
    print(f"embedded: ready at {server.listening_address}", file=sys.stderr, flush=True)
    signal.sigwait(signals)
    # The server's own end waits for its clients' streams; nobody waits for that here.
    sys.stderr.flush()
    os._exit(0)


def parameters(xllamacpp: Any, options: argparse.Namespace) -> Any:
    """The parameters of an ``xllamacpp.Server`` for `options`; raises OSError or ImportError."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model_file(options.model))
    params.hostnames = options.host.split(",")
    params.port = options.port
    params.n_ctx = options.ctx_size
    params.n_parallel = options.parallel
    params.n_batch = options.batch_size
    params.n_ubatch = options.ubatch_size
    # Two servers that share their cores wait for each other in every layer of their models.
    threads = options.threads or max(1, (os.cpu_count() or 1) // 2)
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    if options.alias:
        params.model_alias = set(options.alias.split(","))
    if options.chat_template_file is not None:
        params.chat_template = options.chat_template_file.read_text("utf-8")
    if options.slot_save_path is not None:
        if not options.slot_save_path.is_dir():
            raise NotADirectoryError(f"--slot-save-path: no such folder: {options.slot_save_path}")
        params.slot_save_path = f"{options.slot_save_path}/"
    params.slot_prompt_similarity = options.slot_prompt_similarity
    params.cache_ram_mib = options.cache_ram
    params.sse_ping_interval = options.sse_ping_interval
    params.swa_full = options.swa_full
    if options.api_key:
        params.api_keys = options.api_key.split(",")
    params.endpoint_metrics = options.metrics
    params.reasoning_format = _reasoning_format(xllamacpp, options.reasoning_format)
    params.antiprompt = options.reverse_prompt
    params.sampling.penalty_repeat = options.repeat_penalty
    params.embedding = options.embeddings
    pooling = f"LLAMA_POOLING_TYPE_{options.pooling.upper()}"
    params.pooling_type = getattr(xllamacpp.llama_pooling_type, pooling)
    params.cors_origins = "localhost"
    params.ui = False
    return params


def _reasoning_format(xllamacpp: Any, name: str) -> Any:
    wanted = f"COMMON_REASONING_FORMAT_{name.upper().replace('-', '_')}"
    return getattr(xllamacpp.common_reasoning_format, wanted)


def model_file(name: str) -> Path:
    """
    The GGUF file that ``--model`` names.

    Raises:
        OSError: there is no such file.
        ImportError: there is no such package, or it carries no model.
    """
    if not name.startswith("package:"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"--model: no such file: {path}")
        return path
    package = name.removeprefix("package:")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"--model: no package {package!r} is installed")
    carried = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return carried[0] if carried else _assembled(package)


def _assembled(package: str) -> Path:
    """The model of a package that carries it in parts, put together once."""
    module = import_module(package)
    if not hasattr(module, "assemble"):
        raise ImportError(f"--model: the package {package!r} carries no model")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "claudegw"
    whole = cache / f"{package}.gguf"
    if not whole.exists():
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = cache / f"{package}.{os.getpid()}.part"
        module.assemble(part)
        part.rename(whole)
    return whole


if __name__ == "__main__":
    sys.exit(main())
