"""How far an answer is from its target: the metrics d of the losses, a number a row."""


def squared_error(a, b):
    """Mean over a sample's elements of (a - b)^2, the default metric.  (B, *D), (B, *D) -> (B,)."""
    return (a - b).square().flatten(1).mean(1)


def normalised_error(a, b, c=1e-3):
    """The released code's metric: d / sqrt(d + c^2), d the squared metric, without gradient through the root.

    Its gradient has the length of a root-mean-square error's, so a step does not vanish with the error.
    """
    d = squared_error(a, b)
    return d / (d.detach() + c**2).sqrt()


DISTANCES = {"squared": squared_error, "normalised": normalised_error}
