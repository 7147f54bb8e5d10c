"""Studies: which way to make images is better, by how much, and at what cost. One engine, and what is run on it.

    ot-diffusers compare runs/baseline runs/ot --dataset digits --evaluator runs/evaluator --seeds 5
    ot-diffusers compare --config configs/digits/compare.yaml

The way of a number, a module each::

    config     a `StudyConfig` names variants: a saved pipeline or a training script, a start of the chain, arguments;
               `steps` and `curves` (`axes`) add variants as points of curves
    study      folder, clock, networks, real images; another configuration in the same folder is refused
    runs       for every seed, the scripts train what is to be trained: the same weights at first, the same data order
    sampling   every variant makes its images from the same starting noise, kept in `samples/`
    results    one evaluator that no loss has seen scores them with the same random subsets (`metrics.json` of a seed);
               means, intervals and paired differences over the seeds become `results.json`, `results.md`
    pictures   and `report.html`
    run        all of this in order, as `run_study`; everything finished is kept: the same command goes on where it
               stopped, and more seeds join those that are there

`demo` and `truncation` are configurations of this engine. `stress` and `tracking` are studies of their own: of the
metrics, and of the checkpoints of a run.
"""
