"""Read values from the records of a run."""


def published_name(record: dict) -> str:
    """Return the repo and its tag as `make deploy-mac REPO=` takes them, from the record of `publish`."""
    return f"{record['repo']}@{record['tag']}" if "tag" in record else record["repo"]
