"""Update rules as pure tensor functions: no rank, no sharding and no collective in sight."""
