"""The Hugging Face hub, where there is a network."""

import logging
import os
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, constants, get_session, get_token

from prerl_lightning.errors import InputError, in_one_line

log = logging.getLogger(__name__)

SECONDS = 4.0  # to answer in


@cache
def look() -> None:
    """Once a process, before the hub is asked for anything: where it does not answer, only what was fetched before is
    looked for. Its own library asks six times, with pauses, for each file that is not there."""
    if constants.is_offline_mode():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of the HTTP library, of a proxy, of the system
        log.warning("%s does not answer (%s): going on offline.", constants.ENDPOINT, type(error).__name__)
        os.environ["HF_HUB_OFFLINE"] = "1"  # for `datasets`, vLLM and processes to come
        constants.HF_HUB_OFFLINE = True


def make_repository(name: str, key: str) -> None:
    """A private one for a model, unless there is one: so that it is known before the training whether its weights can
    go there.

    Args:
        key: the setting it is named by, for the message.

    Raises:
        InputError: no network, no token, or none that may write there.
    """
    if constants.is_offline_mode():
        raise InputError(f"{key}: {name}: {constants.ENDPOINT} cannot be reached from here (HF_HUB_OFFLINE). Leave it "
                         "out, and afterwards where there is a network: hf upload.")  # fmt: skip
    if get_token() is None:
        raise InputError(f"{key}: {name}: no token of the hub is here: hf auth login, or set HF_TOKEN.")
    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
    except Exception as error:  # of its name, of HTTP, of the system
        raise InputError(f"{key}: {name} cannot be written to: {in_one_line(error)}") from error


def push(folder: Path, name: str) -> None:
    """A model's folder into its repository. What goes wrong is told: the weights are here, and the run is over."""
    try:
        log.info("The model is at %s", HfApi().upload_folder(repo_id=name, folder_path=folder).commit_url)
    except Exception as error:
        log.warning("The model was not pushed (%s). By hand: hf upload %s %s", in_one_line(error), name, folder)
