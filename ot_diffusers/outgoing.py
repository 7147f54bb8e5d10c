"""Removal of local paths from what leaves this machine: configurations, results and repositories.

A local path shows who works where and on what, and it is useless elsewhere. Every repository passes `outgoing_files`: a
path in a text file is replaced by its last part, and a file that cannot be rewritten is left out. `without_local_paths`
does the same for a configuration that goes to a tracker or into results.
"""

from __future__ import annotations

import bz2
import getpass
import gzip
import html
import json
import logging
import lzma
import mmap
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import PIL.Image
import yaml
from huggingface_hub import constants

from .data import HUB_IDS
from .errors import InputError, require
from .launch.commands import preset_path

logger = logging.getLogger(__name__)

PATH_OPTIONS = {
    "_name_or_path",
    "coupling",
    "data_dir",
    "dataset",
    "denoiser",
    "evaluator",
    "feature_extractor",
    "features",
    "output",
    "output_dir",
    "pipeline",
    "pretrained",
    "resume_from_checkpoint",
}
"""Options whose values are local paths, unless they are known to be Hub ids."""
HUB_ID_KEYS = ("hub_id", "dataset_hub_id")
"""Keys under which records keep the Hub id of a data set."""

HOMES = ("home", "Users", "root")
VOLUMES = ("mnt", "media", "Volumes", "tmp", "scratch", "storage")
SHORT = ("data", "work", "workspace", "content", "kaggle", "srv", "opt", "var", "export", "private", "nfs")
"""Top-level folders in which people keep files; the short words count only at the beginning of a path."""
SYSTEM = {"bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "run", "sbin", "sys", "usr"}

STRUCTURED = (".json", ".ipynb", ".jsonl", ".yaml", ".yml")
DECOMPRESS: Mapping[str, Any] = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
OPAQUE = (".7z", ".br", ".lz4", ".rar", ".zst")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".gif")
UNREADABLE = (
    EOFError,
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
    PIL.Image.DecompressionBombError,
    lzma.LZMAError,
    zipfile.BadZipFile,
    zlib.error,
)
"""Exceptions of the libraries for damaged pictures, tables and archives."""
EVENTS = re.compile(r"(events\.out\.tfevents\.\d+)\..*[A-Za-z_-].*?((?:\.\d+)?)$")
"""File names of TensorBoard: time, host, process and number."""

_PART = r"[^\s\"'`<>|*?:;,()\[\]{}\\/]+"
_REST = rf"(?:[\\/]+(?:{_PART})?)*"


def last_name(path: str) -> str:
    """The last part of a path or `file://` address; `~` for a home folder.

    Example:
        >>> last_name("/home/me/clients/scans/"), last_name("/home/me"), last_name("data\\\\scans")
        ('scans', '~', 'scans')
    """
    parts = [part for part in re.split(r"[\\/]+", path) if part not in ("", ".", "..")]
    parts = parts or list(Path(path).expanduser().resolve().parts[1:])
    is_home = re.fullmatch(r"(?:file:/*)?(?:[A-Za-z]:)?[\\/]+(?:home|Users)[\\/]+[^\\/]+[\\/]*", path) is not None
    return parts[-1] if parts and not is_home and parts[-1] not in _own_names() else "~"


def public_name(path_or_id: str | Path) -> str:
    """The last part of a local path; other texts, such as a Hub id, stay as they are.

    Example:
        >>> public_name("user/model")
        'user/model'
    """
    text = str(path_or_id)
    is_path = text.startswith((".", "/", "~")) or Path(text).expanduser().exists() or not _like_id(text)
    return last_name(text) if is_path else text


def distinct_names(paths: Iterable[str | Path]) -> list[str]:
    """The last parts of paths, as many as are needed to tell the paths apart, joined by hyphens.

    Example:
        >>> distinct_names(["/home/me/a/model", "/home/me/b/model"]), distinct_names(["runs/ot", "runs/baseline"])
        (['a-model', 'b-model'], ['ot', 'baseline'])
    """
    parts = [[part for part in Path(path).parts if part not in ("/", ".", "..", "~")] for path in paths]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["-".join(path_parts[-count:]) for path_parts in parts]
        if len(set(names)) == len(names):
            break
    return names if parts else []


def without_local_paths(value: Any, hub_ids: Iterable[str] = ()) -> Any:
    """A configuration, or any other JSON value, with every local path replaced by its last part.

    Args:
        value: mappings, lists, texts and numbers.
        hub_ids: values that are Hub ids, in addition to those that `value` itself records.

    Example:
        >>> without_local_paths({"dataset": "clients/scans", "output_dir": "/home/me/run", "seed": 1})
        {'dataset': 'scans', 'output_dir': 'run', 'seed': 1}
    """
    return LocalPaths([value, {"hub_id": list(hub_ids)}]).replaced(value)


# --- Finding paths ----------------------------------------------------------------------------------------------------


class LocalPaths:
    """Finds and replaces local paths: those of this process, those named in `records`, and texts that look like one.

    Args:
        records: configurations, as JSON values.
        places: further folders; their parents are local paths as well.
    """

    def __init__(self, records: Iterable[Any] = (), places: Iterable[Path] = ()) -> None:
        records = list(records)
        hub_ids = {text for record in records for key, text in _texts(record) if key in HUB_ID_KEYS}
        named = {text for record in records for key, text in _texts(record) if key in PATH_OPTIONS}
        self.named = {text for text in named if _is_local(text, hub_ids)}
        here = [_home(), Path.cwd(), Path(tempfile.gettempdir()), *places]
        here = [form for place in here for form in (place.absolute(), place.resolve())]
        self.places = {str(folder) for place in here for folder in (place, *place.parents) if len(folder.parts) > 2}

    def replaced(self, value: Any) -> Any:
        """A JSON value with every path replaced by its last part, in keys as well."""
        if isinstance(value, Mapping):
            return {self.replaced(key): self.replaced(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.replaced(entry) for entry in value]
        if not isinstance(value, str):
            return value
        return last_name(value) if value in self.named or _is_absolute(value) else self.replace(value)

    def replace(self, text: str, *, prose: bool = False) -> str:
        """A text with every path replaced by its last part. In `prose`, a text that could be a Hub id stays."""
        return (self._in_prose if prose else self._in_records).sub(lambda match: last_name(match[0]), text)

    def find(self, content: Any) -> str | None:
        """A path in bytes or in a memory map of a file."""
        return next((text for text, code in self._codes if content.find(code) >= 0), None)

    @cached_property
    def _in_records(self) -> re.Pattern[str]:
        return self._pattern(self.named)

    @cached_property
    def _in_prose(self) -> re.Pattern[str]:
        return self._pattern(text for text in self.named if not _like_id(text))

    @cached_property
    def _codes(self) -> list[tuple[str, bytes]]:
        """Texts that occur only in paths, each with its bytes."""
        roots = [f"/{name}/" for name in (*HOMES, *VOLUMES)] + [r":\Users" + "\\", r":\\Users" + r"\\", "file:///"]
        above = {
            str(Path(*Path(place).parts[:3])) for place in self.places
        }  # every longer path begins with one of them
        texts = [*above, *(text for text in self.named if len(_parts(text)) > 1), *roots]
        forms = [(text, form) for text in texts for form in _spellings(text)]
        return [(text, form.encode(code)) for text, form in forms for code in ("utf-8", "utf-16-le", "utf-32-le")]

    def _pattern(self, named: Iterable[str]) -> re.Pattern[str]:
        relative = [text for text in named if not _is_absolute(text) and len(_parts(text)) > 1]
        absolute = [*self.places, *(text for text in named if _is_absolute(text))]
        above = {path.name for path in Path("/").iterdir() if path.is_dir() and len(path.name) > 2} - SYSTEM
        roots = "|".join(map(re.escape, sorted({*HOMES, *VOLUMES, *SHORT, *above})))
        user = _either(name for name in _own_names() if name not in HOMES)
        forms = [
            rf"(?:{_either(absolute)})(?![\w-]){_REST}",
            rf"(?<![\w/.\-])(?:\.\.?[\\/])*(?:{_either(_core(text) for text in relative)})(?![\w-]){_REST}",
            rf"file:/+{_PART}{_REST}",
            rf"(?<![\w/.~\-])/(?:{roots})[\\/]+{_PART}{_REST}",
            rf"(?<![\w/.~\-:])(?:/{_PART})*/(?:{user})(?![\w-]){_REST}",
            rf"(?<![\w/.~\-])(?:{_either([str(_home())] if _home().name else [])})(?![\w-])",
            rf"(?<![\w/.~\-])~/{_PART}{_REST}",
            rf"(?<!\w)[A-Za-z]:[\\/]{{1,2}}{_PART}[\\/]+{_PART}{_REST}",
        ]
        return re.compile("|".join(forms))


def _either(texts: Iterable[str]) -> str:
    """A pattern that matches any spelling of any of the texts, the longest first; without texts it matches nothing."""
    forms = {form for text in texts for form in _spellings(text)}
    return "|".join(map(re.escape, sorted(forms, key=len, reverse=True))) or "(?!)"


def _spellings(text: str) -> set[str]:
    """The spellings of a path in plain text, JSON, URLs and HTML."""
    return {text, json.dumps(text)[1:-1], quote(text), html.escape(text)}


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a JSON value with its key; the right side of `key=value` as well."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _texts(entry, str(name))
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _texts(entry, key)
    elif isinstance(value, str):
        yield key, value
        name, equals, right = value.partition("=")
        if equals and (name in PATH_OPTIONS or key in PATH_OPTIONS):
            yield (name if name in PATH_OPTIONS else key), right


def _is_local(text: str, hub_ids: set[str]) -> bool:
    """Whether the value of a path option is a local path; a bare name is not."""
    if len(_parts(text)) < 2:
        return re.match(r"[\\/~]|\.{1,2}[\\/]|[A-Za-z]:", text) is not None
    if "\n" in text or max(map(len, _parts(text))) > 255:
        return False
    if not _like_id(text):
        return preset_path(text) == Path(text)
    is_hub_id = text in hub_ids or text in HUB_IDS.values()
    return not is_hub_id and (Path(text).exists() or not (_is_cached(text) or preset_path(text).is_file()))


def _is_cached(repo_id: str) -> bool:
    """Whether the local cache holds that repository of the Hub."""
    return (Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}").is_dir()


def _is_absolute(text: str) -> bool:
    """Whether a whole text is an absolute path of two or more parts, on any operating system."""
    return re.fullmatch(r"(?:/[^/\s]+){2,}/?|[A-Za-z]:[\\/][^\n]+|\\\\[^\\\n]+\\[^\n]+|~[\\/][^\n]+", text) is not None


def _like_id(text: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/[\w.-]*\w", text) is not None


def _parts(text: str) -> list[str]:
    return [part for part in re.split(r"[\\/]+", text) if part not in ("", ".", "..", "~")]


def _core(path: str) -> str:
    """A relative path without leading dots and trailing slashes."""
    return re.sub(r"^(?:\.{1,2}[\\/]+)+", "", path).rstrip("\\/")


def _home() -> Path:
    return Path(os.path.expanduser("~"))  # stays `~` where the system knows no home


def _own_names() -> set[str]:
    """Names of the user that the system knows."""
    try:
        return {getpass.getuser(), _home().name} - {""}
    except (KeyError, OSError, ImportError):
        return {_home().name} - {""}


# --- Files ------------------------------------------------------------------------------------------------------------


def outgoing_files(folder: str | Path, *sources: Path) -> dict[str, Path | bytes]:
    """Every file of a folder that may leave this machine: path in the repository to the file, or to its new content.

    Hidden files and folders are left out. In text files, local paths are replaced by their last parts. Any other file
    with a local path is left out with a warning, except weights, which are an error.

    Args:
        folder: a model repository.
        sources: folders that the files come from.

    Raises:
        InputError: a link that leaves the folder, an unreadable file, or weights with a local path in their header.
    """
    folder = Path(folder)
    files = dict(_files(folder))
    try:
        records = [record for name, file in files.items() for record in _records(file, name)]
        paths = LocalPaths(records, [folder, *sources])
        contents = {_without_host(name): _checked(file, name, paths) for name, file in files.items()}
    except OSError as error:
        raise InputError(f"`folder` must hold readable files, got {error.filename!r} ({error.strerror})") from error
    return {name: content for name, content in contents.items() if content is not None}


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Path in the repository and file of everything that is not hidden."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        if path.is_symlink():
            target = path.resolve()
            inside = target.is_file() and target.is_relative_to(folder.resolve())
            shown = inside and not any(part.startswith(".") for part in target.relative_to(folder.resolve()).parts)
            require(shown, "folder", "hold files, not links to folders, to nothing or out of it", name.as_posix())
        if path.is_file():
            yield name.as_posix(), path


def _records(file: Path, name: str) -> list[Any]:
    """The JSON values in a configuration or record; an empty list for other or unreadable files."""
    text = _text(file) if name.endswith(STRUCTURED) else None
    return [] if text is None else _parsed(text, name) or []


def _parsed(text: str, name: str) -> list[Any] | None:
    """The JSON values of a text, one for each line in `.jsonl`; None if it cannot be parsed."""
    try:
        if name.endswith((".yaml", ".yml")):
            return list(yaml.safe_load_all(text))
        return [json.loads(part) for part in (text.splitlines() if name.endswith(".jsonl") else [text])]
    except (ValueError, yaml.YAMLError, RecursionError):
        return None


def _checked(file: Path, name: str, paths: LocalPaths) -> Path | bytes | None:
    """The file itself, its new content, or None where it must be left out."""
    if name.endswith(".safetensors"):
        path = _in_header(file, paths)
        cure = "hold weights without local paths in their header; load them and save them again"
        require(path is None, "folder", cure, f"{name} with {path}")
        return file
    text = _text(file)
    if text is None:
        reason = _in_layers(file, paths)
        if reason is not None:
            logger.warning("%s is left out: %s", name, reason)
        return file if reason is None else None
    cleaned = _rewritten(text, name, paths)
    if cleaned == text:
        return file
    if not name.endswith(STRUCTURED):
        logger.warning("%s: local paths were replaced by their last parts", name)
    return cleaned.encode("utf-8")


def _rewritten(text: str, name: str, paths: LocalPaths) -> str:
    """A text without local paths; exactly the same text if it has none."""
    values = _parsed(text, name) if name.endswith(STRUCTURED) else None
    if values is None:
        return paths.replace(text, prose=not name.endswith(STRUCTURED))
    cleaned = paths.replaced(values)
    if cleaned == values and paths.replace(text, prose=True) == text:
        return text
    if name.endswith((".yaml", ".yml")):
        return yaml.safe_dump_all(cleaned, allow_unicode=True, sort_keys=False)
    indent = None if name.endswith(".jsonl") else 2
    return "".join(json.dumps(value, indent=indent, ensure_ascii=False) + "\n" for value in cleaned)


def _text(file: Path) -> str | None:
    """The text of a file; None for a file that is not text."""
    with file.open("rb") as stream:
        start = stream.read(8192)
        utf16 = start.startswith((b"\xff\xfe", b"\xfe\xff"))
        if b"\0" in start and not utf16:
            return None
        content = start + stream.read()
    try:
        return content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        return None


def _in_header(file: Path, paths: LocalPaths) -> str | None:
    """A local path in the header of a safetensors file: its tensors hold numbers only."""
    with file.open("rb") as stream:
        header = stream.read(min(int.from_bytes(stream.read(8), "little"), 100_000_000))
    try:
        metadata = dict(json.loads(header)).get("__metadata__")
    except (TypeError, ValueError):
        return paths.find(header)
    return next((text for text in _strings(metadata) if paths.replaced(text) != text), None)


def _strings(value: Any) -> Iterator[str]:
    return (part for key, text in _texts(value) for part in (key, text))


def _in_layers(file: Path, paths: LocalPaths) -> str | None:
    """Why a file must be left out: it holds a local path, compressed or not, or cannot be read; None if it may go."""
    try:
        path = next((path for layer in _layers(file) if (path := paths.find(layer)) is not None), None)
    except UNREADABLE as error:
        return f"its content cannot be read ({type(error).__name__})"
    return None if path is None else f"it holds the local path {path}"


def _layers(file: Path) -> Iterator[Any]:
    """The bytes of a file, and those of its compressed contents."""
    if file.stat().st_size:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content
    suffix = file.suffix.lower()
    if suffix in OPAQUE:
        raise ValueError("compressed in a way that Python cannot read")
    if suffix in PICTURES:
        with PIL.Image.open(file) as picture:
            picture.load()
            yield "\n".join(map(str, picture.info.values())).encode()
    elif suffix == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(file) as table:
            yield from (batch.serialize().to_pybytes() for batch in table.iter_batches())
    elif suffix in DECOMPRESS:
        with DECOMPRESS[suffix](file) as stream:
            yield stream.read()
    elif zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            yield from (archive.read(entry) for entry in packed)


def _without_host(name: str) -> str:
    """A file's path in the repository; the names that TensorBoard gives would show the host's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + EVENTS.sub(r"\1\2", file)
