"""The servers that we measure ourselves against, with the same random weights, interleaved in one run."""
