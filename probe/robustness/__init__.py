"""Word error rate of speech mixed with noise at given SNRs, for each class of noise (section 2 of the paper)."""
