"""A model as it was before a call: what is put back after a failure, whichever line it struck.

Every stage undoes what it does to the model in a ``finally`` of its own. An interrupt can strike inside that ``finally`` too, and then the rest of
it does not run: so the whole call keeps a second record, and goes by it once the exception has come up to it.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from nettrim.buffers import Buffers
from nettrim.errors import NetTrimError
from nettrim.sharing import thread_count, turn

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class Before:
    """A model's flags, hooks and buffers, and torch's switches, at the time that this is made.

    Parameters
    ----------
    model : nn.Module
        Its parameters are not copied until `keep_weights` says that they are about to change.
    """

    def __init__(self, model: nn.Module) -> None:
        with turn():
            self._modules = [(module, module.training, [dict(getattr(module, kind)) for kind in _HOOKS]) for module in model.modules()]
            self._forwards = [(module, vars(module).get("forward")) for module in model.modules()]  # a stub takes a block's place meanwhile
            self._buffers = Buffers(model.modules())
            self._parameters = [(name, value, value.requires_grad, value._version) for name, value in model.named_parameters()]
            self._fused = torch.backends.mha.get_fastpath_enabled()
        self._gradients, self._threads = torch.is_grad_enabled(), thread_count()
        self._weights: list[tuple[Tensor, Tensor]] = []

    def check_weights(self) -> None:
        """Refuse to go on where the weights have changed meanwhile: some layers were then solved against others than those measured.

        Raises
        ------
        NetTrimError
        """
        for name, parameter, _, version in self._parameters:
            if parameter._version != version:
                raise NetTrimError(
                    f"parameter {name!r} changed while the model was pruned; expected nobody else to write into it: is it being trained, or "
                    "pruned with inplace=True, in another thread? Prune a copy, or one after the other"
                )

    def keep_weights(self, modules: list[nn.Module]) -> None:
        """Copy the parameters of these layers: they are about to be written into."""
        self._weights = [(parameter, parameter.detach().clone()) for module in modules for parameter in module.parameters()]

    def put_back(self) -> None:
        """Make the model what it was; a step that fails keeps none of the others from being done."""
        with ExitStack() as stack:
            stack.callback(self._put_back_switches)
            with turn(), torch.no_grad(), ExitStack() as steps:  # the last is done first
                for step in (self._buffers.put_back, self._put_back_modules, self._put_back_forwards, self._put_back_parameters):
                    steps.callback(step)

    def _put_back_parameters(self) -> None:
        for parameter, value in self._weights:
            parameter.copy_(value)
        for _, parameter, wanted, _ in self._parameters:
            parameter.requires_grad_(wanted)

    def _put_back_forwards(self) -> None:
        for module, forward in self._forwards:
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward

    def _put_back_modules(self) -> None:
        for module, training, hooks in self._modules:
            module.training = training
            for kind, kept in zip(_HOOKS, hooks, strict=True):
                found = getattr(module, kind)
                if found.keys() != kept.keys():
                    found.clear()
                    found.update(kept)

    def _put_back_switches(self) -> None:
        torch.backends.mha.set_fastpath_enabled(self._fused)
        torch.set_grad_enabled(self._gradients)
        if thread_count() != self._threads:
            torch.set_num_threads(self._threads)
