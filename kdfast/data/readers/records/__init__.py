"""Files that hold many encoded images: Parquet and Arrow tables, and webdataset shards."""
