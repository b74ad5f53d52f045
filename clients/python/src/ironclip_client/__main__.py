"""`ironclip-client`, also `python -m ironclip_client`: an Ironclip service from the shell, answers as JSON."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ironclip_client.client import Client
from ironclip_client.errors import IronclipError, UsageError
from ironclip_client.probes import ProbeEvent
from ironclip_client.version import VERSION

_EPILOG = """The service's address comes from --url or IRONCLIP_URL (else http://127.0.0.1:8000), an API key from
IRONCLIP_API_KEY. Status 1: something could not be answered; the error is on stderr as JSON. Status 2: wrong usage."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    asked = parser().parse_args(arguments)
    # The names of files need not be text, and not every terminal has all letters.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with Client(asked.url, timeout=asked.timeout, retries=asked.retries) as client:
            failed: int = asked.run(client, asked)
            return failed
    except UsageError as error:
        print(f"ironclip-client: {error}", file=sys.stderr)
        return 2
    except IronclipError as error:
        _fail(error)
        return 1
    except BrokenPipeError:
        # Whoever read the answers has seen enough; nothing more is written at the end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"ironclip-client: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser("ironclip-client", description=__doc__, epilog=_EPILOG)
    top.add_argument("--version", action="version", version=VERSION)
    top.add_argument("--url", help="address of the service")
    top.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS", help="for one call, all tries together")
    top.add_argument("--retries", type=int, default=4, metavar="N", help="tries after the first at most")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Client, argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(run=run)
        return one

    classify = command(
        "classify", _classify, "Which of the labels fits each picture? One JSON object a line, in order."
    )
    classify.add_argument("images", nargs="+", metavar="IMAGE", help="a picture's file, or - for the standard input")
    _add_decision(classify)
    classify.add_argument("--top-k", type=int, metavar="N", help="predictions for each picture at most")
    classify.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at a time")
    classify.add_argument("--batch", type=int, default=8, metavar="N", help="pictures in one request")

    embed = command("embed", _embed, "Unit vectors of pictures and texts.")
    embed.add_argument("--images", nargs="+", default=[], metavar="IMAGE")
    embed.add_argument("--texts", nargs="+", default=[], metavar="TEXT")
    embed.add_argument("--encoder")
    embed.add_argument(
        "--embed-dtype", choices=["float32", "float16", "int8", "binary"], help="of the numbers; float32"
    )
    embed.add_argument("--truncate", action="store_true", default=None, help="cut texts that are too long")

    probe = command("probe", _probe, "How easily is the decision about a picture fooled?")
    probe.add_argument("image", metavar="IMAGE")
    _add_decision(probe)
    probe.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help=_OPTION_HELP)
    probe.add_argument("--follow", action="store_true", help="print its events as they come, one JSON object a line")
    probe.add_argument("--cost", action="store_true", help="only say what it may cost")
    probe.add_argument("--out", type=Path, metavar="FILE", help="write the picture that broke it, as PNG")

    models = command("models", _models, "What is served.")
    models.add_argument("name", nargs="?", help="one encoder alone")
    command("label-sets", _label_sets, "The registered label sets.")
    command("ready", _ready, "Can the service answer? Status 0 if it can.")
    return top


_OPTION_HELP = "any other option of a probe, its value as JSON or as text: max_eps=8, effort=thorough, eps=[1,2]"


def _add_decision(command: argparse.ArgumentParser) -> None:
    labels = command.add_mutually_exclusive_group()
    labels.add_argument("--labels", nargs="+", metavar="LABEL", help="the labels to choose from")
    labels.add_argument("--label-set", metavar="NAME", help="a registered label set")
    command.add_argument("--encoder", help="one of `models`")
    command.add_argument("--defence", type=_json_or_text, help='a name, or {"name": ..., option: ...}')
    command.add_argument("--templates", nargs="+", metavar="TEMPLATE", help="prompt templates with {} for the name")
    command.add_argument("--levels", choices=["rollup", "prompts"], help="how upper levels of the tree are scored")


def _decision(asked: argparse.Namespace) -> dict[str, Any]:
    names = ("label_set", "encoder", "defence", "templates", "levels")
    return {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}


def _classify(client: Client, asked: argparse.Namespace) -> int:
    if asked.labels is None and asked.label_set is None:
        raise UsageError("say what to choose from: --labels A B C, or --label-set NAME")
    images = [sys.stdin.buffer if name == "-" else name for name in asked.images]
    options: Any = {**_decision(asked), "top_k": asked.top_k}
    found = client.classify_many(images, asked.labels, concurrency=asked.concurrency, batch=asked.batch, **options)
    failed = 0
    for name, outcome in zip(asked.images, found, strict=True):
        if isinstance(outcome, IronclipError):
            failed = 1
            _show({"image": name, "error": _form(outcome)})
        else:
            _show({"image": name, **outcome.raw})
    return failed


def _embed(client: Client, asked: argparse.Namespace) -> int:
    options: Any = {
        "encoder": asked.encoder,
        "truncate": asked.truncate,
        "embed_dtype": asked.embed_dtype,
        "encoding_format": "float",
    }
    found = client.embed(images=asked.images, texts=asked.texts, **options)
    _show(found.raw)
    return int(bool(found.images.errors or found.texts.errors))


def _probe(client: Client, asked: argparse.Namespace) -> int:
    given = dict(_pair(text) for text in asked.option)
    for name in ("image", "labels"):
        if name in given:
            raise UsageError(f"{name} has an argument of its own: leave it out of --option")
    if given.get("wait") is not None and (asked.out is not None or asked.follow):
        raise UsageError("--out and --follow wait for the probe: leave wait out of --option")
    options: Any = {**_decision(asked), **given}
    if asked.cost:
        _show(client.probe_cost(asked.image, asked.labels, **options))
        return 0
    if asked.out is not None:
        options["artefacts"] = ["adversarial"]
    if asked.follow:
        with client.probe_stream(asked.image, asked.labels, **options) as stream:
            for event in stream:
                _show(_event(event))
            result = stream.result()
    else:
        result = client.probe(asked.image, asked.labels, **options)
        _show({name: value for name, value in result.raw.items() if name != "artefacts"})
    if asked.out is not None:
        if result.broken_at is None:
            print("ironclip-client: nothing broke the decision, so there is no picture to write", file=sys.stderr)
        else:
            asked.out.write_bytes(result.picture())
    return 0


def _models(client: Client, asked: argparse.Namespace) -> int:
    _show(client.models().raw if asked.name is None else client.model(asked.name).raw)
    return 0


def _label_sets(client: Client, asked: argparse.Namespace) -> int:
    for one in client.label_sets.list():
        _show({"name": one.name, "digest": one.digest, "read_only": one.read_only})
    return 0


def _ready(client: Client, asked: argparse.Namespace) -> int:
    state = client.ready(timeout=min(5.0, asked.timeout))
    _show({"ready": state.ready, "reason": state.reason})
    return 0 if state else 1


def _event(event: ProbeEvent) -> Mapping[str, Any]:
    data = {name: value for name, value in event.data.items() if name not in ("artefacts", "adversarial")}
    return {"event": event.kind, **data}


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--option takes NAME=VALUE, not {text!r}")
    return name.strip().replace("-", "_"), _json_or_text(value)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _form(error: IronclipError) -> Mapping[str, Any]:
    return error.problem.raw if error.problem is not None else {"detail": error.detail, "status": error.status}


def _fail(error: IronclipError) -> None:
    print(json.dumps({"error": _form(error)}, ensure_ascii=False), file=sys.stderr)


def _show(content: Mapping[str, Any]) -> None:
    print(json.dumps(content, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    sys.exit(main())
