"""Text classifiers on their way: from the folder that a training leaves into a bundle, and out of a published one into the next."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from features.bundle import TOKENIZER, BundleError, Classifier, ClassifierName, Manifest, checksum, classifier_files, fetch_file

SPEC = "classifier.json"


class ClassifierFolder(BaseModel):
    """What ``classifier.json`` says: a classifier's name, and what a manifest will say of it. It reads with a tokenizer of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: ClassifierName
    classifier: Classifier


def save_folder(folder: Path, name: str, classifier: Classifier) -> None:
    """Writes ``classifier.json``, the last file of a classifier's folder."""
    (folder / SPEC).write_text(ClassifierFolder(name=name, classifier=classifier).model_dump_json(indent=2) + "\n")


def read_folder(folder: Path) -> ClassifierFolder:
    """Reads ``classifier.json``.

    Raises:
        FileNotFoundError: the folder is not that of a trained classifier.
        BundleError: it is one of another release, or damaged.
    """
    if not (folder / SPEC).is_file():
        raise FileNotFoundError(f"{folder} holds no trained classifier")
    try:
        return ClassifierFolder.model_validate_json((folder / SPEC).read_bytes())
    except ValidationError as error:
        raise BundleError(f"{folder.name}: {SPEC} cannot be read: {str(error).splitlines()[0]}") from None


def newest_folders(root: Path) -> dict[str, Path]:
    """Returns by name the newest folder of each classifier below ``root``, whose folders are ``<name>/<time>``."""
    found: dict[str, Path] = {}
    for spec in sorted(root.glob(f"*/*/{SPEC}")):
        found[spec.parent.parent.name] = spec.parent
    return found


def put_into(bundle: Path, folders: Iterable[Path]) -> dict[str, Classifier]:
    """Copies classifiers into a bundle folder that has its tokenizer already; returns what its manifest shall say of them.

    Where a classifier reads as the bundle's encoder does, they share the tokenizer file.

    Raises:
        FileNotFoundError, BundleError: as ``read_folder``.
        ValueError: two of them have one name.
    """
    classifiers: dict[str, Classifier] = {}
    shared = checksum(bundle / TOKENIZER)
    for folder in folders:
        made = read_folder(folder)
        if made.name in classifiers:
            raise ValueError(f"two classifiers are named {made.name}")
        files = classifier_files(made.name)
        own = checksum(folder / files.tokenizer) != shared
        for name in (files.graph, files.golden, *((files.tokenizer,) if own else ())):
            shutil.copyfile(folder / name, bundle / name)
        classifiers[made.name] = made.classifier.model_copy(update={"own_tokenizer": own})
    return dict(sorted(classifiers.items()))


def fetch_folders(manifest: Mapping[str, Any], uri: str, root: Path) -> list[Path]:
    """Copies the classifiers of a published bundle into a folder each below ``root``, as their training left them.

    Args:
        manifest: as the registry holds it.
        uri: the bundle's address.
        root: an empty folder.

    Raises:
        BundleError: a file cannot be read, or is damaged.
    """
    published = Manifest.model_validate(manifest)
    folders = []
    for name, classifier in published.classifiers.items():
        files, folder = classifier_files(name), root / name
        folder.mkdir(parents=True)
        tokenizer = files.tokenizer if classifier.own_tokenizer else TOKENIZER
        for source, target in ((files.graph, files.graph), (files.golden, files.golden), (tokenizer, files.tokenizer)):
            fetch_file(uri, source, folder / target, expected=published.files[source])
        save_folder(folder, name, classifier.model_copy(update={"own_tokenizer": True}))
        folders.append(folder)
    return folders
