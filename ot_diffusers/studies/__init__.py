"""Studies: which method is better, by how much, and at what cost. One engine, and the studies that use it.

    ot-diffusers compare runs/baseline runs/ot --dataset digits --evaluator runs/evaluator --seeds 5
    ot-diffusers compare --config configs/digits/compare.yaml

Where to read next, in the order of the work::

    config     a `StudyConfig` names variants: a saved pipeline or a training script, a start of the chain, arguments;
               `steps` and `curves` (`axes`) add variants as points of curves
    study      folder, clock, networks and real images; another configuration in the same folder is refused
    runs       the scripts train the variants of every seed, with the same initial weights and data order
    sampling   every variant samples from the same starting noise; the images are kept in `samples/`
    results    one evaluator, not used in training or guidance, scores them with the same random subsets (`metrics.json`
               of a seed); means, intervals and paired differences over the seeds go to `results.json` and `results.md`
    pictures   the pictures of `report.html`
    run        all of this in order, as `run_study`; everything complete is kept: rerun the same command to resume, or
               with more seeds to add them

`demo` and `truncation` are configurations of this engine. `stress` and `tracking` are separate studies, of the metrics
and of the checkpoints of a run.
"""
