"""Plans, their lowering, and the executors that run them: `reference` in numpy, `native` over csrc/.

`ops` says what a model computes, `plan` lowers it, `tensors` are the weights as stored, `batch` the arrays of a step,
`target` the instruction set, `policies` the cache's eviction policies in native code. Knows nothing of requests,
sequences or tenants.
"""
