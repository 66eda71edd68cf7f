"""What nobody named: how much of it stays, on two small models that draw.

The other benchmark (``benchmarks/erasure``) asks what becomes of things in general. This one asks
the harshest: for each erasure the ten things that it changes most, by keys and values, and words
that neither its captions nor its vocabulary sample know.
"""
