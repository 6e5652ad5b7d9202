"""What an OpenRecon image is built from: Containerfile, label, and the command that joins them.

The label tells the scanner what the image needs and which parameters an operator may set. Its rules
are those of ``com.siemens-healthineers.magneticresonance.openrecon.metadata`` 1.1.0 as public
examples show them; the vendor's own schema is not public.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recallseg import __version__
from recallseg.engines.durable import write_file
from recallseg.engines.errors import InputError, OutputError
from recallseg.engines.reading import read_text
from recallseg.runtime.json_text import printable
from recallseg.runtime.services.mrd.settings import MrdSettings
from recallseg.runtime.services.settings import EXAMPLES, Configuration

__all__ = ["LABEL", "check_label", "openrecon_label", "write_openrecon"]

LABEL = "com.siemens-healthineers.magneticresonance.openrecon.metadata:1.1.0"
PORT = 9002
MOST_PARAMETERS = 14
RULES = "rules"
"""Value of the parameter ``config`` that leaves the choice to the rules' patterns."""
_TYPES = ("int", "double", "string", "boolean", "choice")
_REGULATORY = (
    "device_trade_name", "production_identifier", "manufacturer_address", "made_in",
    "manufacture_date", "material_number", "gtin", "udi", "safety_advices",
    "special_operating_instructions", "additional_relevant_information",
)  # fmt: skip
_FLAGS = ("can_process_adjustment_data", "can_use_gpu")
_COUNTS = (
    "min_count_required_gpus", "min_required_gpu_memory", "min_required_memory",
    "min_count_required_cpu_cores",
)  # fmt: skip


def openrecon_label(configuration: Configuration) -> dict[str, Any]:
    """Return the label of an image with this configuration.

    Regulatory texts are left for who builds the image: nothing is claimed here.

    Raises
    ------
    InputError
        If there is no section ``mrd``, or no rule.
    """
    settings = configuration.mrd
    if settings is None or not configuration.rules:
        raise InputError(
            "an OpenRecon image needs a section [mrd] and a rule. 'recallseg config example mrd' "
            "prints one."
        )
    gpu = any("cuda" in rule.recipe.engine or "tensorrt" in rule.recipe.engine
              for rule in configuration.rules)  # fmt: skip
    texts = dict.fromkeys(_REGULATORY, "")
    texts["device_trade_name"] = "RecallSeg"
    texts["production_identifier"] = __version__
    texts["safety_advices"] = "Research only. Not for diagnosis."
    return {
        "general": {
            "name": {"en": "RecallSeg"},
            "version": ".".join(re.findall(r"\d+", __version__)[:3]),
            "vendor": "RecallSeg",
            "information": {"en": "Segments images after annotated ones (few-shot)."},
            "id": "recallseg",
            "regulatory_information": texts,
        },
        "reconstruction": {
            "transfer_protocol": {"protocol": "ISMRMRD", "version": "1.4.1"},
            "port": PORT,
            "emitter": "image",
            "injector": "image",
            "can_process_adjustment_data": False,
            "can_use_gpu": gpu,
            "min_count_required_gpus": int(gpu),
            "min_required_gpu_memory": 4096 if gpu else 0,
            "min_required_memory": 8192,
            "min_count_required_cpu_cores": 2,
            "content_qualification_type": "RESEARCH",
        },
        "parameters": _parameters([rule.name for rule in configuration.rules], settings),
    }


def check_label(label: Any) -> list[str]:
    """Return what is wrong with a label, a sentence each; empty if nothing is."""
    if not isinstance(label, Mapping):
        return ["a label is an object"]
    missing = [name for name in ("general", "reconstruction", "parameters") if name not in label]
    if missing:
        return [f"there is no '{name}'" for name in missing]
    return [
        *_check_general(label["general"]),
        *_check_reconstruction(label["reconstruction"]),
        *_check_parameters(label["parameters"]),
    ]


def write_openrecon(configuration: Configuration, folder: Path) -> list[Path]:
    """Write what an image is built from; return the files.

    Raises
    ------
    InputError
        If the configuration does not allow it.
    OutputError
        If the folder is there and not empty, or cannot be written.
    """
    label = openrecon_label(configuration)
    if wrong := check_label(label):
        raise InputError(f"the label breaks OpenRecon's rules: {'; '.join(wrong)}.")
    files = {
        "OpenReconLabel.json": json.dumps(label, indent=2) + "\n",
        "Containerfile": _containerfile(),
        "build.sh": _BUILD.format(label=shlex.quote(LABEL)),
    }
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{printable(folder)} is no folder. Name a new one.")
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise OutputError(f"{printable(folder)} is not empty. Name a new folder.")
        (folder / "conf").mkdir()
        for name, text in files.items():
            mode = 0o755 if name.endswith(".sh") else 0o644
            write_file(folder / name, text.encode(), mode=mode)
    except OSError as error:
        raise OutputError(f"{printable(folder)} cannot be written: {error.strerror}.") from error
    return [folder / name for name in files]


_BUILD = """#!/bin/sh
# Put here: recallseg-*.whl; conf/mrd.toml with the libraries that it names, by relative paths, and
# their bundles. Then: ./build.sh recallseg:1, and save the image as the scanner's manual says.
set -eu
cd "$(dirname "$0")"
test -f conf/mrd.toml || {{ echo "conf/mrd.toml is missing" >&2; exit 1; }}
ls recallseg-*.whl > /dev/null
"${{BUILDER:-podman}}" build --format docker -f Containerfile \\
  --label {label}="$(base64 -w 0 OpenReconLabel.json)" -t "${{1:?name an image}}" .
"""


def _containerfile() -> str:
    """Return the services' Containerfile, for this service, with its configuration in it."""
    lines = read_text(EXAMPLES / "Containerfile").splitlines()
    kept = [line for line in lines if not line.startswith(("#", "VOLUME"))]
    at = next(i for i, line in enumerate(kept) if line.startswith("USER"))
    kept[at:at] = ["COPY --chown=recallseg conf /etc/recallseg"]
    text = "\n".join(kept).replace("ARG SERVICES=node", "ARG SERVICES=mrd")
    port = f"ENV RECALLSEG__MRD__HOST=0.0.0.0 RECALLSEG__MRD__PORT={PORT}\nEXPOSE {PORT}"
    return f'{text}\n{port}\nCMD ["mrd", "--config", "/etc/recallseg/mrd.toml"]\n'


def _parameters(rules: list[str], settings: MrdSettings) -> list[dict[str, Any]]:
    def one(name: str, kind: str, label: str, told: str, default: Any, **more: Any) -> Any:
        words = {"label": {"en": label}, "information": {"en": told}}
        return {"id": name, "type": kind, **words, "default": default, **more}

    choices = [{"id": RULES, "name": {"en": "by description"}}]
    choices += [{"id": rule, "name": {"en": rule}} for rule in rules]
    returned = settings.returned
    return [
        one("config", "choice", "Segmentation", "What is segmented", RULES, values=choices),
        one("structures", "string", "Structures", "Names, commas between; empty: all", ""),
        one("original", "boolean", "Original", "Return images as they are", returned.original),
        one("mask", "boolean", "Masks", "Return masks as a series", returned.mask),
        one("overlay", "boolean", "Overlay", "Return coloured images", returned.overlay),
        one("roi", "boolean", "Contours", "Return images with contours", returned.roi),
    ]


def _check_general(general: Any) -> Iterable[str]:
    if not isinstance(general, Mapping):
        yield "general is an object"
        return
    for name in ("name", "information"):
        if not _words(general.get(name)):
            yield f"general.{name} has a text in English ('en')"
    if not re.fullmatch(r"\d+\.\d+\.\d+", str(general.get("version", ""))):
        yield "general.version is three numbers, as in 1.0.0"
    for name in ("vendor", "id"):
        if not (isinstance(general.get(name), str) and general[name]):
            yield f"general.{name} is a text"
    texts = general.get("regulatory_information")
    for name in _REGULATORY:
        if not (isinstance(texts, Mapping) and isinstance(texts.get(name), str)):
            yield f"general.regulatory_information.{name} is a text"


def _check_reconstruction(found: Any) -> Iterable[str]:
    if not isinstance(found, Mapping):
        yield "reconstruction is an object"
        return
    if found.get("transfer_protocol") != {"protocol": "ISMRMRD", "version": "1.4.1"}:
        yield "reconstruction.transfer_protocol is ISMRMRD 1.4.1"
    if found.get("port") != PORT:
        yield f"reconstruction.port is {PORT}"
    for name in ("emitter", "injector"):
        if found.get(name) not in ("raw", "image", "compleximage"):
            yield f"reconstruction.{name} is raw, image or compleximage"
    for name in _FLAGS:
        if not isinstance(found.get(name), bool):
            yield f"reconstruction.{name} is true or false"
    for name in _COUNTS:
        if type(found.get(name)) is not int or found[name] < 0:
            yield f"reconstruction.{name} is a number, 0 or more"
    if not found.get("can_use_gpu") and found.get("min_count_required_gpus"):
        yield "reconstruction needs a GPU that it cannot use"
    if found.get("content_qualification_type") not in ("PRODUCT", "SERVICE", "RESEARCH"):
        yield "reconstruction.content_qualification_type is PRODUCT, SERVICE or RESEARCH"


def _check_parameters(found: Any) -> Iterable[str]:
    if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
        yield "parameters is a list of objects"
        return
    if len(found) > MOST_PARAMETERS:
        yield f"there are {len(found)} parameters, {MOST_PARAMETERS} may be"
    names = [str(each.get("id", "")) for each in found]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"two parameters are called '{name}'"
    if not any(each.get("id") == "config" and each.get("type") == "choice" for each in found):
        yield "one parameter is a choice called 'config'"
    for name, each in zip(names, found, strict=True):
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            yield f"a parameter's id is letters, digits and _, got '{name}'"
        if each.get("type") not in _TYPES:
            yield f"parameter '{name}' is of a type {', '.join(_TYPES)}"
        elif not _fits(each):
            yield f"parameter '{name}' has a default that it does not allow"
        if not _words(each.get("label")):
            yield f"parameter '{name}' has a label in English ('en')"


def _fits(parameter: Mapping[str, Any]) -> bool:
    kind, default = parameter["type"], parameter.get("default")
    if kind == "boolean":
        return isinstance(default, bool)
    if kind == "string":
        return isinstance(default, str)
    if kind == "choice":
        values = parameter.get("values")
        return isinstance(values, list) and default in [
            each.get("id") for each in values if isinstance(each, Mapping)
        ]
    number = type(default) is int or (kind == "double" and type(default) is float)
    low, high = parameter.get("minimum", default), parameter.get("maximum", default)
    return number and low <= default <= high


def _words(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("en"), str) and value["en"] != ""
