-- Background work gives way. A background ticket is placed only on slots that are free, beyond the reserve, and only while no interactive
-- ticket waits. If an interactive ticket finds no free slot, it is placed beside background tickets all the same: the engine pauses or
-- preempts background requests for it, which wastes nothing (lmaas/engine/hooks/background.py). So interactive tickets take at most the
-- slots of a replica, and all tickets together may be more. An engine cannot run more adapters than it has adapter slots, so the background
-- tickets that hold the adapter slot which an interactive ticket needs are put back: the latest ones, since they lose least. They hold
-- nothing any more and do not wait again by themselves; their owners are told, and submit new tickets for the work. A background ticket is
-- never put back for another one. Those on a replica that drains are put back as well.

local MAX_BACKGROUND_QUEUED = 10000 -- background tickets that may wait in a pool
local MAX_BACKGROUND_PLACED = 32    -- background tickets that one call places
local MAX_TRIES = 4                 -- kinds of needs for which one call looks for background tickets to put back

-- Returns what a background ticket may take now, as bounds for `choose`; nil for nothing.
local function bounds_of_background(pool)
  local slots = pool.vars.room - reserve_of(pool)
  if slots <= 0 then return nil end
  -- While interactive work is recent, one adapter slot stays free for it.
  return { slots = slots, runs_only = is_busy(pool) and pool.vars.adapters < 2 }
end

-- Takes its slot from a background ticket. Its owner has yet to end it.
local function put_back(pool, ticket)
  charge(pool, ticket, -charged(pool, ticket))
  next_of(pool, 'yields')
  local replica = ticket.replica
  let_go(pool, ticket)
  ticket.state, ticket.revoked = TICKET.YIELDED, replica
  put(pool, ticket)
  tell(ticket, TICKET.YIELDED)
  pool.yields = pool.yields - 1
end

-- Returns the background tickets whose adapter runs for none but them on a replica, for the adapter with the latest ticket: to put them
-- back frees an adapter slot. `ids` are the latest of the replica; an adapter with more is not considered.
local function sharing_an_adapter(pool, replica, ids)
  local of = {}
  for _, id in ipairs(ids) do
    local ticket = get(pool, id)
    of[ticket.adapter] = of[ticket.adapter] or {}
    table.insert(of[ticket.adapter], ticket)
  end
  for _, id in ipairs(ids) do
    local adapter = get(pool, id).adapter
    local runs = adapter ~= '' and tonumber(redis.call('HGET', pool.key .. ':running:' .. replica.id, adapter))
    if runs and runs == #of[adapter] then return of[adapter] end
  end
  return nil
end

-- Returns the background tickets of a replica whose end would make room there for a ticket with these needs, mostly none, and how well the
-- replica suits (0: the adapter runs there, 1: it is resident, 2: neither); nil if there is no room, or this call may not put back so many.
-- `state` counts the replicas on which an adapter slot had to be found (`emptied`): that costs most, so only a few are considered.
local function in_the_way(pool, replica, weight, adapter, kept, state)
  local runs = adapter ~= '' and redis.call('HEXISTS', pool.key .. ':running:' .. replica.id, adapter) == 1
  if not fresh(pool, replica) or not left_by(kept, replica, adapter, runs) then return nil end
  if replica.load - replica.back + math.min(weight, replica.slots) > replica.slots then return nil end
  local found = {}
  if adapter ~= '' and not runs and replica.runs >= replica.adapter_slots then
    state.emptied = state.emptied + 1
    if state.emptied > MAX_CROWDED then return nil end
    found = sharing_an_adapter(pool, replica, redis.call('ZREVRANGE', pool.key .. ':back:' .. replica.id, 0, pool.yields - 1))
  end
  return found, (adapter == '' or runs) and 0 or is_resident(pool, replica, adapter) and 1 or 2
end

-- Returns a replica where an interactive ticket fits beside background tickets, or nil, and puts back those that hold the adapter slot that
-- it needs. It considers the replicas with the latest background tickets; among equals, the one with the least interactive load.
local function make_room(pool, weight, adapter, kept)
  if pool.yields <= 0 or pool.vars.back == 0 then return nil end
  pool.tries = pool.tries + 1
  if pool.tries > MAX_TRIES then return nil end
  local best, best_rank, best_share, at, state = nil, nil, nil, nil, { emptied = 0 }
  for _, id in ipairs(redis.call('ZREVRANGE', pool.at.yielding, 0, MAX_CANDIDATES - 1)) do
    local replica = replica_of(pool, id)
    local found, rank = in_the_way(pool, replica, weight, adapter, kept, state)
    if found then
      local share = (replica.load - replica.back) / replica.slots
      if not best or rank < best_rank or (rank == best_rank and share < best_share) then
        best, best_rank, best_share, at = found, rank, share, replica
      end
    end
  end
  for _, ticket in ipairs(best or {}) do
    see_yield(pool, ticket.held)
    put_back(pool, ticket)
  end
  return at
end

-- Puts back the background tickets that run on a replica which drains, as many as this call may: something else needs its machine, and a
-- drain is asked for until nothing runs.
local function put_back_all(pool, replica)
  for _, id in ipairs(redis.call('ZREVRANGE', pool.key .. ':back:' .. replica.id, 0, pool.yields - 1)) do
    local ticket = get(pool, id)
    if ticket.state == TICKET.GRANTED then put_back(pool, ticket) end
  end
end
