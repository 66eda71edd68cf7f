"""The version of the engine: raised with each change of results, as stored ones are found by it."""

VERSION = "0.10.0"
