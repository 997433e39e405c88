"""Everything that is written to disk and read back.

files.py        one file: paths, atomic writes, JSON and JSON lines
folder.py       one folder: manifest, lock, checksums, stages
yaml.py         YAML with every scalar as text
arrays.py       fingerprints of arrays, finite numbers
processes.py    several processes: the one that writes, barriers
stopping.py     SIGINT and SIGTERM
"""
