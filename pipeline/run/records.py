"""What the records of a run say."""


def published_name(record: dict) -> str:
    """Return what `make deploy-mac REPO=` takes. record: that of `publish`."""
    return f"{record['repo']}@{record['tag']}" if "tag" in record else record["repo"]
