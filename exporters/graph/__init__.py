"""ONNX graphs of vision models, shared by the ONNX and TensorRT targets; nothing here knows a target.

Making a graph:
    trace      a model as a float graph, and which product belongs to which layer
    lint       values and graphs that no engine would run rightly or fast
    passes     named rewrites of a float graph: codes, quantizers, names
    produce    an artifact's quantized graph: trace, lint, and the passes of a format (`formats`); the files beside it

Proving a written graph:
    layers     its quantized layers, read back from the file alone
    reopen     every number in it, against the artifact
    parity     its layers cut out as one model, each fed the same input on both sides
    between    everything from one product to the next, cut out and fed the parent's own values
    gates      the verdicts: layers, kernels, and the exact format, compared end to end
    classes    the whole net: outputs and classes, beside all that

Around them: runtime (ONNX Runtime and the packages of ONNX), images (what is compared on), plan (the dry run).
"""
