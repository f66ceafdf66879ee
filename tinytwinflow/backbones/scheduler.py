"""The scheduler of a pipeline whose model is shown a second time: it says how far each step goes, and takes the step.

It needs diffusers, so no other room imports it before a pipeline is there.
"""

import diffusers
import numpy as np
from diffusers.configuration_utils import register_to_config

from ..method.samplers import time_grid

# the same step; the second is there in older versions of diffusers too
Euler = getattr(diffusers, "FlowMapEulerDiscreteScheduler", diffusers.FlowMatchEulerDiscreteScheduler)


class JumpScheduler(Euler):
    """diffusers' own Euler steps on an even grid of times from 1 to 0, and `interval`, the times of the step now due.

    mode: "any" jumps to the next time (r = next t), "multi" follows the velocity (r = t). A grid that a pipeline
    proposes by itself is replaced: those are even too, but some end elsewhere, or are bent for models of many steps
    (mu). `sigmas` of another form are the user's, and are taken.
    Raises ValueError for another mode, and in `step` if the model was not shown the times of that step.
    """

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, mode: str = "any"):
        if mode not in ("any", "multi"):
            raise ValueError(f"unknown mode {mode!r}: choose from any, multi")
        super().__init__(num_train_timesteps=num_train_timesteps)
        self._seen, self._begun = None, False  # the step whose times the model was shown; whether there are steps

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        """Begin anew with so many steps. sigmas: falling times in (0, 1], see above."""
        if sigmas is None and timesteps is not None:
            sigmas = np.asarray(timesteps) / self.config.num_train_timesteps
        if sigmas is None or _proposed(sigmas):
            sigmas = time_grid(num_inference_steps if sigmas is None else len(sigmas))[:-1]
        super().set_timesteps(device=device, sigmas=list(map(float, sigmas)))
        self._seen, self._begun = None, True

    def interval(self):
        """The times t and r, two numbers as tensors, that the model is to be shown in the step that is due."""
        self._seen = step = self._due()
        if not self._begun or step >= len(self.timesteps):
            raise ValueError("an attached model was called, but its scheduler takes no steps: is another in its place?")
        t = self.sigmas[step]
        return t.float(), (self.sigmas[step + 1] if self.config.mode == "any" else t).float()

    def _due(self):
        """The number of the step that is due."""
        if self.step_index is not None:
            return self.step_index
        return self.begin_index or 0

    def step(self, model_output, timestep, sample, return_dict=True, generator=None):
        """One step, see diffusers; nothing is drawn, though some pipelines give a generator."""
        if self.step_index is None and self.begin_index is None:
            self.set_begin_index(self.index_for_timestep(timestep) or 0)
        if self._seen != self._due():
            raise ValueError(
                "the model was not shown how far this step goes: tinytwinflow.attach makes a pipeline do so"
            )
        return super().step(model_output, timestep, sample, return_dict=return_dict)


def _proposed(sigmas):
    """Whether a grid is one that pipelines propose: even, from 1 to the last but one of the times, or to nearly 0.

    >>> _proposed([1.0, 0.75, 0.5, 0.25]), _proposed([1.0, 0.001]), _proposed([1.0, 0.9]), _proposed([0.8, 0.4])
    (True, True, False, False)
    """
    grids = (np.linspace(1, last, len(sigmas)) for last in (1 / len(sigmas), 0.001))
    return any(np.allclose(sigmas, grid, rtol=0, atol=2e-3) for grid in grids)
