"""The Hugging Face hub, where there is a network."""

import logging
import os
from functools import cache

from huggingface_hub import constants, get_session

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
