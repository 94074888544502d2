"""A verifier: from 0 to 1, of a response's text."""


def ends_right(prompt: str, response: str, ground_truth: str, extra: dict) -> float:
    """The number behind the last # is the answer; half of that for one that is off by ten.

    Args:
        extra: the row's other columns, and ``truncated``: the length limit ended the response.
    """
    answer = response.rpartition("#")[2].strip()
    if extra["truncated"] or not answer.lstrip("-").isdigit():
        return 0.0
    off = abs(int(answer) - int(ground_truth))
    return 1.0 if off == 0 else 0.5 if off == 10 else 0.0
