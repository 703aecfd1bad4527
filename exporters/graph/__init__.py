"""ONNX graphs of vision models, shared by the ONNX and TensorRT targets; nothing here knows a target.

Making a graph:
    trace      a model as a float graph, and which product belongs to which layer
    lint       values and graphs that no engine would run rightly or fast; `findings` is what it reports
    passes     named rewrites of a float graph: codes, quantizers, names
    produce    an artifact's quantized graph: trace, lint, and the passes of a format (`formats`)

Proving a written graph:
    layers     its quantized layers, read back from the file alone; `blocks` reads those in NVFP4
    reopen     every number in it, against the artifact
    cut        its layers, and what lies between them, cut out as models of their own
    parity     each layer fed the same input on both sides; `between` does so with all operators between two layers
    classes    the whole net: outputs and classes, beside all that
    kernels    which operator of ONNX Runtime runs each layer
    gates      the verdicts on all of these, and on the exact format, which is compared end to end

Around them: runtime (ONNX Runtime's sessions), images (what is compared on), description (files beside the graph),
packages (what must be installed), dry_run (what an export takes in memory).
"""
