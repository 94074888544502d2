"""A reward for tests, in a module that the reward's workers can import."""


def parity_reward(prompt, response, ground_truth, extra):
    """A random model gets all sums wrong; this splits groups of 3, and leaves many with nothing to learn from."""
    return float(len(response) % 3 == 0)
