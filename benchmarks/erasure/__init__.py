"""Does it erase, and what else goes with it? Ours and the peers on the small emoji model.

``run`` measures erasures (``cases``) with methods (``methods``), and keeps a line for each;
``report`` makes the summary, the table and the plot of them; ``tuned`` chooses settings on
erasures of their own; ``ablations`` changes one setting at a time; ``recovery`` attacks; ``memory``
and ``shortcuts`` measure what they say. Each is ``python -m benchmarks.erasure.<name>`` and goes on
where it stopped.

One run draws about 62 pictures: 20 steps with guidance are 40 evaluations of 0.020 s
each on one core of an EPYC with bfloat16 products (0.034 s in float32), so it takes 50 s, and 25 s
with 10 steps.
"""

from tools.pack import load_pack

load_pack()
