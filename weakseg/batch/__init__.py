"""`weakseg pseudo-label`: masks of many images, over days and crashes.

    inputs.py     what there is to label: folders, lists, tables, tar shards, datasets, object stores
    labeller.py   one image to its files and its row of the manifest, by a bundle here or by a server
    local.py      an engine: threads of this process      ray_engine.py   another: actors of a Ray cluster
    job.py        what is done, what is left, and how it ends
    journal.py    rows that are finished, kept as the job goes on; manifest.py   the rows and what made them
    exports.py    the finished masks in the formats of other tools      review.py   which of them a person should see
    store.py      a folder or a bucket: files that are whole or absent
    telemetry.py  progress, Prometheus' textfile, timings

Data flows one way: inputs -> job -> engine -> labeller -> store, and rows back to the job, which alone writes what is
about many images.
"""
