"""The order in which waiting lines of one pool are leased. Pure."""

from collections.abc import Mapping, Sequence

from lmaas.store.line_leases import Offer

#: A batch with less time than this to its deadline goes before the others.
URGENT_S = 3600.0


def shares(offers: Sequence[Offer], count: int, served: Mapping[str, int]) -> dict[tuple[str, str], int]:
    """Divide `count` lines among the batches, by tenant's and batch's id.

    Batches near their deadline come first, by their deadlines. Then each tenant gets the same number of lines, and those that have been
    `served` the fewest get what is left over. A tenant's batches have their turns by deadline.
    """
    found: dict[tuple[str, str], int] = {}
    left = {(offer.tenant_id, offer.batch_id): offer.pending for offer in offers}
    by_deadline = sorted(offers, key=lambda offer: offer.left_s)

    def take(offer: Offer, most: int) -> int:
        key = offer.tenant_id, offer.batch_id
        taken = min(most, left[key])
        if taken > 0:
            left[key] -= taken
            found[key] = found.get(key, 0) + taken
        return taken

    for offer in by_deadline:
        if offer.left_s < URGENT_S:
            count -= take(offer, count)
    of_tenant: dict[str, list[Offer]] = {}
    for offer in by_deadline:
        of_tenant.setdefault(offer.tenant_id, []).append(offer)
    turns = sorted(of_tenant, key=lambda tenant_id: served.get(tenant_id, 0))
    while count > 0 and turns:
        portion = max(1, count // len(turns))
        still = []
        for tenant_id in turns:
            wanted = min(portion, count)
            for offer in of_tenant[tenant_id]:
                taken = take(offer, wanted)
                wanted -= taken
                count -= taken
            if wanted == 0 and any(left[tenant_id, offer.batch_id] for offer in of_tenant[tenant_id]):
                still.append(tenant_id)
        turns = still if count > 0 else []
    return found
