-- Placement: the replica on which a ticket runs. An adapter slot is a resource like a sequence slot: an engine that runs more distinct
-- adapters than it has slots for works on them one after the other. So a ticket may be passed over for one behind it that fits now,
-- within a bound.

-- How many tickets may be placed before a ticket that was passed over, until something is kept free for it. Tickets behind it cannot
-- delay it after that; everything else goes on meanwhile.
local RESERVE_PASSES = 32 -- then an adapter slot is emptied for it
local MAX_PASSES = 64     -- then a whole replica is emptied for it, if it needs several sequence slots
-- To both bounds are added FAIR_TURNS times the placements after which all waiting tickets of its tenant would have had their turn, if the
-- tenants took fair turns. With a fixed bound, every waiting ticket would be passed over too often once the queue is longer than the bound,
-- and engines would run half empty.
local FAIR_TURNS = 2
local MAX_TURNS = 128     -- the most fair turns that count: with many waiting tenants they would outlast any deadline
local MAX_TENANTS = 256   -- tenants visited in one round
local MAX_LINE = 64       -- tenants whose whole queues count for a position; of the others, one ticket each
local MAX_DEPTH = 64      -- tickets of one tenant visited in one round
local MAX_VISITS = 512    -- tickets visited in one round
local MAX_KEPT = 16       -- adapter slots and replicas kept free in one round
local MAX_CROWDED = 4     -- replicas whose adapter slots are considered for that
local PORTION = 16        -- tenants or tickets that are read at once, but first only FEW: mostly the first one fits
local FEW = 2

-- What is kept free for tickets that have waited for too long: `at` is replica id → {whole, victims: {adapter}, holders: {adapter}}, and
-- the adapter slots of the victims are emptied for the holders. `count` is how many replicas there are in it, `keeps` how often something
-- was kept, and `holders` are all adapters for which a slot is.
local function nothing_kept()
  return { at = {}, count = 0, keeps = 0, holders = {} }
end

-- Returns whether a replica is open to a ticket although something may be kept free there. `runs`: its adapter runs there.
local function left_by(kept, replica, adapter, runs)
  local here = kept.at[replica.id]
  if not here then return true end
  if here.whole then return false end
  if adapter == '' then return true end
  if runs then return not here.victims[adapter] end
  return here.holders[adapter] or false
end

-- Returns the replica for a ticket: first where its adapter runs, then where it is resident, then where an adapter slot is free; among
-- equals the least loaded, then the first by name. Of an adapter that is on more than MAX_CANDIDATES replicas, and of replicas with
-- different numbers of slots, it may not see the very best one.
local function choose(pool, weight, adapter, kept)
  sweep(pool)
  index(pool)
  local runs, window = false, MAX_CANDIDATES + kept.count
  local function fits(replica)
    return replica.load + math.min(weight, replica.slots) <= replica.slots and left_by(kept, replica, adapter, runs)
  end
  if adapter == '' then return least_loaded(pool, 'free', fits, window) end
  runs = true
  local found = least_loaded_of(pool, 'free', pool.key .. ':runs:' .. adapter, fits, window)
  if found then return found end
  runs = false
  return least_loaded_of(pool, 'spare', pool.key .. ':has:' .. adapter, fits, window) or least_loaded(pool, 'spare', fits, window)
end

local function keep(kept, id)
  if not kept.at[id] then
    kept.at[id] = { victims = {}, holders = {} }
    kept.count = kept.count + 1
  end
  kept.keeps = kept.keeps + 1
  return kept.at[id]
end

-- Returns the adapters that run on the least loaded replicas without a free adapter slot, those with the fewest tickets first, as
-- {replica id, adapter, tickets}.
local function victims_of(pool)
  local found = {}
  for _, id in ipairs(redis.call('ZRANGE', pool.key .. ':crowded', 0, MAX_CROWDED - 1)) do
    local running = redis.call('HGETALL', pool.key .. ':running:' .. id)
    for i = 1, #running, 2 do found[#found + 1] = { id, running[i], tonumber(running[i + 1]) } end
  end
  table.sort(found, function(one, other)
    if one[3] == other[3] then return one[1] .. one[2] < other[1] .. other[2] end
    return one[3] < other[3]
  end)
  return found
end

-- Keeps an adapter slot free: the one with the fewest tickets, which is probably empty first.
local function keep_adapter_slot(pool, adapter, kept)
  if kept.holders[adapter] or kept.keeps >= MAX_KEPT then return end
  kept.victims = kept.victims or victims_of(pool)
  local runs_on = {}
  for _, victim in ipairs(kept.victims) do
    if victim[2] == adapter then runs_on[victim[1]] = true end
  end
  for _, victim in ipairs(kept.victims) do
    local id, here = victim[1], kept.at[victim[1]]
    if not runs_on[id] and not (here and (here.whole or here.victims[victim[2]])) then
      here = keep(kept, id)
      here.victims[victim[2]], here.holders[adapter], kept.holders[adapter] = true, true, true
      return
    end
  end
end

-- Keeps a whole replica free: the least loaded one.
local function keep_replica(pool, kept)
  if kept.keeps >= MAX_KEPT then return end
  for _, id in ipairs(redis.call('ZRANGE', pool.key .. ':free', 0, kept.count)) do
    if not (kept.at[id] and kept.at[id].whole) then
      keep(kept, id).whole = true
      return
    end
  end
end

-- Lets a ticket's gateway have its slot. Returns what it is told.
local function grant(pool, ticket)
  ticket.state, ticket.granted = TICKET.GRANTED, pool.now
  put(pool, ticket)
  return {
    replica = ticket.replica, url = replica_of(pool, ticket.replica).url,
    queue_ms = ticket.placed - ticket.submitted, load_ms = ticket.granted - ticket.placed,
  }
end

-- Places a ticket that is not in the queue (any more) on a replica.
local function place(pool, ticket, replica, caller)
  next_of(pool, 'placed')
  ticket.placed = pool.now
  charge(pool, ticket, PROMPT_COST * ticket.prompt_tokens)
  hold(pool, ticket, replica)
  if ticket.adapter == '' or is_resident(pool, replica, ticket.adapter) then
    local fields = grant(pool, ticket)
    if ticket.id ~= caller then tell(ticket, TICKET.GRANTED, fields) end
    return
  end
  ticket.state = TICKET.LOADING
  put(pool, ticket)
  if redis.call('HSETNX', pool.key .. ':loading:' .. replica.id, ticket.adapter, ticket.source) == 1 then
    redis.call('PUBLISH', 'lmaas:replica:' .. replica.id, SIGNAL.LOAD)
  end
  redis.call('ZADD', waits_on(pool, replica.id, ticket.adapter), ticket.sequence, ticket.id)
end

-- Calls `visit` with the members of a sorted set, at most `most`, in portions, until it returns something.
local function in_portions(key, most, visit)
  local first, count = 0, FEW
  while first < most do
    local members, found = redis.call('ZRANGE', key, first, math.min(most, first + count) - 1), nil
    if #members > 0 then found = visit(members) end
    if found ~= nil or #members < count then return found end
    first, count = first + count, PORTION
  end
  return nil
end

-- Calls `visit` for queued tickets in the order of service, until it returns something: first tickets that came back, then tenant by
-- tenant. Its arguments are the ticket's id, its needs, how many tickets had been placed when it was first passed over (nil: never), and
-- after how many placements in fair turns its tenant would have no waiting ticket (at most MAX_TURNS).
local function each_waiting(pool, visit)
  local visits, turns = 0, 0
  local function visit_all(ids)
    local needs = redis.call('HMGET', pool.key .. ':needs', unpack(ids))
    local passed = redis.call('HMGET', pool.key .. ':passed', unpack(ids))
    for i, id in ipairs(ids) do
      visits = visits + 1
      if visits > MAX_VISITS then return false end
      local found = visit(id, needs[i], tonumber(passed[i] or nil), turns)
      if found ~= nil then return found end
    end
    return nil
  end
  local found = in_portions(pool.key .. ':front', MAX_VISITS, visit_all)
  if found == nil then
    local count = math.min(MAX_TENANTS, redis.call('ZCARD', pool.key .. ':waiting'))
    found = in_portions(pool.key .. ':waiting', count, function(tenants)
      for _, tenant in ipairs(tenants) do
        local queue = pool.key .. ':queue:' .. tenant
        local depth = math.min(MAX_DEPTH, redis.call('ZCARD', queue))
        turns = math.min(MAX_TURNS, depth * count)
        local one = in_portions(queue, depth, visit_all)
        if one ~= nil then return one end
      end
      return nil
    end)
  end
  return found or nil
end

-- Places the first ticket that fits. Returns false if none does.
local function place_next(pool, caller)
  local placed = var(pool, 'placed', 0)
  local replicas, newly_passed, kept, asked = {}, {}, nothing_kept(), {}
  local found = each_waiting(pool, function(id, need, passed_at, turns)
    local replica = replicas[need]
    if replica == nil then
      local weight, adapter = weight_and_adapter(need)
      replica = choose(pool, weight, adapter, kept) or false
      replicas[need] = replica
    end
    if replica then return { id = id, replica = replica } end
    if not passed_at then
      newly_passed[#newly_passed + 1] = id
    else
      local passes = placed - passed_at - FAIR_TURNS * turns
      if passes >= RESERVE_PASSES then
        local weight, adapter = weight_and_adapter(need)
        -- Once for each adapter: if no slot could be kept for one ticket, none can be for the next.
        if adapter ~= '' and not asked[adapter] then
          asked[adapter] = true
          keep_adapter_slot(pool, adapter, kept)
        end
        if passes >= MAX_PASSES and weight > 1 then keep_replica(pool, kept) end
      end
    end
    return nil
  end)
  if not found then return false end
  for _, id in ipairs(newly_passed) do redis.call('HSET', pool.key .. ':passed', id, placed) end
  local ticket = get(pool, found.id)
  dequeue(pool, ticket)
  place(pool, ticket, found.replica, caller)
  return true
end

-- Returns whether any replica may have room.
local function has_room(pool)
  sweep(pool)
  index(pool)
  return redis.call('EXISTS', pool.key .. ':free') == 1
end

-- Grants every slot that can be granted.
local function dispatch(pool, caller)
  for _ = 1, redis.call('ZCARD', pool.key .. ':queue') do
    if not has_room(pool) or not place_next(pool, caller) then return end
  end
end

-- Places a new ticket if no ticket waits and there is room, with the same result as queueing and dispatching it. Returns false otherwise.
local function place_at_once(pool, ticket)
  if redis.call('EXISTS', pool.key .. ':queue') == 1 then return false end
  local replica = choose(pool, ticket.weight, ticket.adapter, nothing_kept())
  if not replica then return false end
  pass_through(pool, ticket)
  place(pool, ticket, replica, ticket.id)
  return true
end

-- Returns the adapters that the queue needs first (adapter → source), as many as run at once.
local function awaited(pool, count)
  local loads, found = {}, 0
  each_waiting(pool, function(id, need)
    local _, adapter = weight_and_adapter(need)
    if adapter ~= '' and not loads[adapter] then
      loads[adapter], found = get(pool, id).source, found + 1
    end
    if found >= count then return true end
    return nil
  end)
  return loads
end
