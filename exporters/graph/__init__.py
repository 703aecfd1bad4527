"""ONNX graphs of vision models, shared by the ONNX and TensorRT targets; independent of any target.

Making a graph:
    trace      exports a model as a float graph, and maps each matrix multiplication to its layer
    lint       finds values and graphs that engines would run incorrectly or slowly
    passes     named rewrites of a float graph: codes, quantizers, names
    produce    makes an artifact's quantized graph: trace, lint, passes of a format (`formats`); and the files beside it

Checking a written graph:
    layers     reads its quantized layers back from the file alone
    reopen     compares every number in it with the artifact
    parity     extracts its layers as one model and compares each with torch, given the same input
    between    extracts the operators between matrix multiplications and compares them, given the parent's values
    gates      the verdicts on layers, kernels, and the exact format, which is compared end to end
    classes    compares outputs and classes of the whole model, in addition to all of the above

Supporting modules: runtime (ONNX Runtime and the ONNX packages), images (inputs for comparisons), plan (the dry run).
"""
