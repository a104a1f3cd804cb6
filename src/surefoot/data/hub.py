"""Data sets of the Hugging Face hub."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from surefoot.data.dataset import Dataset
from surefoot.data.extra import needed
from surefoot.data.options import Options
from surefoot.data.splits import from_splits
from surefoot.errors import InputError

SECONDS_TO_ANSWER = 10.0

_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(?::(?P<config>[\w.-]+))?")


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form ``org/name`` or ``org/name:config``."""
    return _ID.fullmatch(source) is not None


def load_hub(source: str, options: Options) -> Dataset:
    """Fetch a data set from the hub, or from the hub's cache on this machine where the hub is out of reach.

    Args:
        source: ``org/name`` or ``org/name:config``.
        options: What was asked.

    Raises:
        InputError: The hub does not have it, or cannot be reached and there is no copy, or its columns are unusable.
    """
    match = _ID.fullmatch(source)
    assert match is not None
    splits = fetch(source, match["id"], match["config"])
    return from_splits(source, source.partition("/")[2], splits, options, [])


def fetch(source: str, repository: str, config: str | None) -> Any:
    """The splits of a hub data set as a `datasets.DatasetDict`."""
    datasets = needed("datasets", "read the Hugging Face hub")
    hub = needed("huggingface_hub", "read the Hugging Face hub")
    trouble = _reach(hub, repository)
    if isinstance(trouble, (hub.errors.RepositoryNotFoundError, hub.errors.HFValidationError)):
        raise InputError(
            f"data {source!r}: there is no such file or folder here, and the Hugging Face hub has no data set "
            f"{repository!r}, or it is private or gated: check the name, or log in with `hf auth login`"
        ) from trouble
    try:
        with quiet(datasets), _offline(datasets, hub, trouble is not None):
            return datasets.load_dataset(repository, config)
    except (OSError, ValueError, RuntimeError, hub.errors.HTTPError, datasets.exceptions.DatasetsError) as error:
        if trouble is not None:
            raise InputError(
                f"data {source!r}: there is no such file or folder here, the Hugging Face hub cannot be reached "
                f"({trouble}), and its cache on this machine has no copy: check the name and the network, or give a "
                f"local folder of its parquet files"
            ) from error
        raise InputError(
            f"data {source!r} cannot be loaded from the Hugging Face hub ({error}): check the name, its configuration "
            f"(org/name:config) and that it is stored as parquet"
        ) from error


@contextmanager
def quiet(datasets: ModuleType) -> Iterator[None]:
    """No progress bars of `datasets` inside, unless the environment insists on them; outside as it was before."""
    if datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is not None or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _reach(hub: ModuleType, repository: str) -> Exception | None:
    """Ask the hub for the data set once: `datasets` itself tries for half a minute before it says that it cannot."""
    try:
        hub.HfApi().dataset_info(repository, timeout=SECONDS_TO_ANSWER)
    except (OSError, hub.errors.HTTPError, hub.errors.HFValidationError) as error:
        return error
    return None


@contextmanager
def _offline(datasets: ModuleType, hub: ModuleType, wanted: bool) -> Iterator[None]:
    """Both libraries in their offline mode inside, so that they turn to their caches at once."""
    before = (datasets.config.HF_HUB_OFFLINE, hub.constants.HF_HUB_OFFLINE)
    if wanted:
        datasets.config.HF_HUB_OFFLINE = hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.constants.HF_HUB_OFFLINE = before
