"""The plan of a pipeline as plain values, and the protocol that a model implements. No torch.

A configuration is what the user wrote; a plan is that configuration resolved for one module, once
per run. The path of `layers_per_stage` from YAML to a device, each file visited once:

On ranks (`torch.distributed.pipelining`)::

    YAML -> strategies/distributed/strategy.py   constructor; makes a PipelineConfig
         -> pipeline/config.py                    rules of its values; the requested PipelineShape
         -> pipeline/plan.py                      resolve, once the module is known: Plan.stages
         -> strategies/distributed/run.py         parameters of this rank's stages
         -> strategies/distributed/stage.py       runs the blocks of a stage

On IPUs (PopTorch)::

    YAML -> strategies/ipu/strategy.py            constructor; makes an IPUConfig
         -> pipeline/ipu/fields.py                Graphcore's name, and the value for the pod type
         -> pipeline/ipu/config.py                rules of its values; a PipelineShape per program
         -> pipeline/plan.py                      resolve, once the module is known: Plan.stages
         -> strategies/ipu/program/annotations.py places the blocks of a stage on an IPU

All other code reads the plan.
"""
