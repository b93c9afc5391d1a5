"""The plan of a pipeline in plain values, and the protocol that a model offers. No torch.

A configuration is what the user wrote; a plan is what it means for one module, resolved once. How
`layers_per_stage` comes from YAML to a device, each file visited once:

On ranks (`torch.distributed.pipelining`)::

    YAML -> strategies/distributed/strategy.py   constructor; makes a PipelineConfig
         -> pipeline/config.py                    rules of its values; the PipelineShape asked for
         -> pipeline/plan.py                      resolve, once the module is known: Plan.stages
         -> strategies/distributed/run.py         this rank's part: keeps and moves its parameters
         -> strategies/distributed/stage.py       runs the blocks of a stage

On IPUs (PopTorch)::

    YAML -> strategies/ipu/strategy.py            constructor; makes an IPUConfig
         -> pipeline/ipu/fields.py                its name there, and its value by type of pod
         -> pipeline/ipu/config.py                rules of its values; a PipelineShape a program
         -> pipeline/plan.py                      resolve, once the module is known: Plan.stages
         -> strategies/ipu/program/annotations.py places the blocks of a stage on an IPU

Whoever else wants to know asks the plan.
"""
