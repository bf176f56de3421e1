"""The means of :func:`nettrim.verify`: everything that a report says, found again by another way than the one that wrote it.

Nothing here imports a solver, nor what makes programs, budgets, promises and certificates. Forward passes run in torch through hooks of this
package's own; sums and bounds are numpy in float64. Shared with the rest, because they are conventions and not results: which samples are kept
out and how a batch is handed to a model (:mod:`nettrim.calibration`), evaluation mode (:func:`nettrim.passes.evaluation`), which layers run and
what follows each (:mod:`nettrim.tracing`), how a module's weights and rows lie in a matrix (:mod:`nettrim.layers`), how BatchNorm statistics are
estimated again (:mod:`nettrim.batchnorm`), and what a layer's errors are said to cost at the network's output (:mod:`nettrim.sensitivity`: the
measure by which weights were chosen, no promise).
"""
