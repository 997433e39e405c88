"""Everything that is written to disk and read back: whole files, checksums, locks, fingerprints."""
