-- Where a ticket runs. An adapter slot is a resource like a sequence slot: an engine that runs more distinct adapters than it has slots for
-- works on them one after the other. So a ticket may be passed over for one behind it that fits now, within a bound.

-- How many tickets may be placed before one that was passed over until something is kept for it. Everything else goes on meanwhile: what is
-- behind it can then hold it up no more.
local RESERVE_PASSES = 32 -- an adapter slot: it is emptied
local MAX_PASSES = 64     -- a whole replica, if it needs several sequence slots: it is emptied
-- And so many times the placements in which all that its tenant has waiting would have had its turn, were the tenants' turns fair ones: with a
-- fixed bound, everything that waits is passed over too often once the queue is longer than that, and engines run half empty.
local FAIR_TURNS = 2
local MAX_TURNS = 128     -- and no more fair turns than this: with many tenants that wait they would outlast any deadline
local MAX_TENANTS = 256   -- tenants looked at in one round
local MAX_LINE = 64       -- tenants whose queues a position counts in full
local MAX_DEPTH = 64      -- tickets of one tenant looked at in one round
local MAX_LOOKS = 512     -- tickets looked at in one round
local MAX_REAPED = 100    -- tickets of lost gateways that one call ends; the next one goes on

local function fresh(pool, replica)
  return replica.state == REPLICA.READY and not replica.suspect and pool.now - replica.beat < STALE_MS
end

local function hold(pool, ticket, replica)
  -- More than a replica has: all of it. The next replica may have more.
  ticket.held = math.min(ticket.weight, replica.slots)
  -- When a slot was taken last: what waits learns from it whether turns take longer than usual.
  replica.load, replica.turn = replica.load + ticket.held, pool.now
  if ticket.adapter ~= '' then
    replica.running[ticket.adapter] = (replica.running[ticket.adapter] or 0) + 1
    replica.used[ticket.adapter] = pool.now
  end
  ticket.replica = replica.id
  pool.dirty[replica.id] = true
end

local function let_go(pool, ticket)
  local replica, held = ticket.replica and pool.replicas[ticket.replica], ticket.held
  ticket.replica, ticket.held = nil, nil
  if not replica then return end
  replica.load = math.max(0, replica.load - held)
  local count = replica.running[ticket.adapter]
  if count then replica.running[ticket.adapter] = count > 1 and count - 1 or nil end
  local loading = replica.loading[ticket.adapter]
  if loading then loading.tickets[ticket.id] = nil end
  pool.dirty[replica.id] = true
end

local function grant(pool, ticket)
  ticket.state, ticket.granted = TICKET.GRANTED, pool.now
  put(pool, ticket)
  return {
    replica = ticket.replica, url = pool.replicas[ticket.replica].url,
    queue_ms = ticket.placed - ticket.submitted, load_ms = ticket.granted - ticket.placed,
  }
end

-- Whether what is kept on a replica for somebody who has waited for too long leaves room for others: `kept` is replica id →
-- {whole, victims: {adapter}, holders: {adapter}}. The slots of the victims are emptied, for the holders.
local function left_by(kept, replica, adapter)
  local here = kept[replica.id]
  if not here then return true end
  if here.whole then return false end
  if adapter == '' then return true end
  if replica.running[adapter] then return not here.victims[adapter] end
  return here.holders[adapter] or false
end

-- The replica for a ticket: where its adapter runs already, then where it is resident, then a free adapter slot; among equals
-- the least loaded, then the first by name.
local function choose(pool, weight, adapter, kept)
  local best, best_rank, best_load = nil, nil, nil
  for id, replica in pairs(pool.replicas) do
    if fresh(pool, replica) and replica.load + math.min(weight, replica.slots) <= replica.slots and left_by(kept, replica, adapter) then
      local rank = 0
      if adapter ~= '' and not replica.running[adapter] then
        if size(replica.running) >= replica.adapter_slots then
          rank = nil
        else
          rank = replica.resident[adapter] and 1 or 2
        end
      end
      local load = replica.load / replica.slots
      if rank and (not best or rank < best_rank or (rank == best_rank and (load < best_load or (load == best_load and id < best.id)))) then
        best, best_rank, best_load = replica, rank, load
      end
    end
  end
  return best
end

local function keep(kept, id)
  kept[id] = kept[id] or { victims = {}, holders = {} }
  return kept[id]
end

-- Keep an adapter slot: the one that is empty soonest, by how many requests run on it. Whether there was one to keep.
local function keep_adapter_slot(pool, adapter, kept)
  local best, best_victim, best_count = nil, nil, nil
  for id, replica in pairs(pool.replicas) do
    local here = kept[id]
    if here and here.holders[adapter] then return false end
    if fresh(pool, replica) and not replica.running[adapter] and size(replica.running) >= replica.adapter_slots then
      for victim, count in pairs(replica.running) do
        local free = not (here and (here.whole or here.victims[victim]))
        if free and (not best or count < best_count or (count == best_count and id .. victim < best .. best_victim)) then
          best, best_victim, best_count = id, victim, count
        end
      end
    end
  end
  if not best then return false end
  local here = keep(kept, best)
  here.victims[best_victim], here.holders[adapter] = true, true
  return true
end

-- Keep a whole replica: the one with the most room. Whether there was one to keep.
local function keep_replica(pool, kept)
  local best, best_room = nil, nil
  for id, replica in pairs(pool.replicas) do
    local room = replica.slots - replica.load
    if fresh(pool, replica) and not (kept[id] and kept[id].whole) and (not best or room > best_room or (room == best_room and id < best)) then
      best, best_room = id, room
    end
  end
  if best then keep(kept, best).whole = true end
  return best ~= nil
end

-- What has been taken off the queue, if it was there.
local function place(pool, ticket, replica, caller)
  redis.call('HINCRBY', pool.key .. ':vars', 'placed', 1)
  ticket.placed = pool.now
  charge(pool, ticket, PROMPT_COST * ticket.prompt_tokens)
  hold(pool, ticket, replica)
  if ticket.adapter == '' or replica.resident[ticket.adapter] then
    local fields = grant(pool, ticket)
    if ticket.id ~= caller then tell(ticket, TICKET.GRANTED, fields) end
    return
  end
  ticket.state = TICKET.LOADING
  put(pool, ticket)
  local loading = replica.loading[ticket.adapter]
  if not loading then
    loading = { source = ticket.source, tickets = {} }
    replica.loading[ticket.adapter] = loading
    redis.call('PUBLISH', 'lmaas:replica:' .. replica.id, SIGNAL.LOAD)
  end
  loading.tickets[ticket.id] = 1
end

-- Calls `look` with each queued ticket's id, its needs, how many were placed when it was passed over first (nil: never), and how many
-- placements fair turns would take until its tenant has nothing waiting (at most MAX_TURNS), in the order of service, until `look` answers something: first what
-- came back, then tenant by tenant.
local function each_waiting(pool, look)
  local looks = 0
  local function look_at(ids, turns)
    if #ids == 0 then return nil end
    local needs = redis.call('HMGET', pool.key .. ':needs', unpack(ids))
    local passed = redis.call('HMGET', pool.key .. ':passed', unpack(ids))
    for i, id in ipairs(ids) do
      looks = looks + 1
      if looks > MAX_LOOKS then return nil end
      local found = look(id, needs[i], tonumber(passed[i] or nil), turns)
      if found ~= nil then return found end
    end
    return nil
  end
  local found = look_at(redis.call('ZRANGE', pool.key .. ':front', 0, MAX_LOOKS - 1), 0)
  if found ~= nil then return found end
  local tenants = redis.call('ZRANGE', pool.key .. ':waiting', 0, MAX_TENANTS - 1)
  for _, tenant in ipairs(tenants) do
    local ids = redis.call('ZRANGE', pool.key .. ':queue:' .. tenant, 0, MAX_DEPTH - 1)
    found = look_at(ids, math.min(MAX_TURNS, #ids * #tenants))
    if found ~= nil then return found end
    if looks > MAX_LOOKS then return nil end
  end
  return nil
end

-- Place the first ticket that fits; false if none does.
local function place_next(pool, caller)
  local placed = var(pool, 'placed', 0)
  local replicas, newly_passed, kept, asked = {}, {}, {}, {}
  local found = each_waiting(pool, function(id, need, passed_at, turns)
    local replica = replicas[need]
    if replica == nil then
      local weight, adapter = string.match(need, '^(%d+)|(.*)$')
      replica = choose(pool, tonumber(weight), adapter, kept) or false
      replicas[need] = replica
    end
    if replica then return { id = id, replica = replica } end
    if not passed_at then
      newly_passed[#newly_passed + 1] = id
    else
      local passes = placed - passed_at - FAIR_TURNS * turns
      if passes >= RESERVE_PASSES then
        local weight, adapter = string.match(need, '^(%d+)|(.*)$')
        -- Once for each adapter: what could not be kept for one ticket cannot be for the next.
        if adapter ~= '' and not asked[adapter] then
          asked[adapter] = true
          keep_adapter_slot(pool, adapter, kept)
        end
        if passes >= MAX_PASSES and tonumber(weight) > 1 then keep_replica(pool, kept) end
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

-- Give out every slot that can be given out.
local function dispatch(pool, caller)
  for _ = 1, redis.call('ZCARD', pool.key .. ':queue') do
    local free = false
    for _, replica in pairs(pool.replicas) do free = free or (fresh(pool, replica) and replica.load < replica.slots) end
    if not free or not place_next(pool, caller) then return end
  end
end

-- Place a new ticket if nobody waits and there is room, as queueing and dispatching it would. False otherwise.
local function place_at_once(pool, ticket)
  if redis.call('ZCARD', pool.key .. ':queue') > 0 then return false end
  local replica = choose(pool, ticket.weight, ticket.adapter, {})
  if not replica then return false end
  pass_through(pool, ticket)
  place(pool, ticket, replica, ticket.id)
  return true
end

-- The adapters that the tickets in the queue need first, and where their files are: as many as run at once.
local function awaited(pool, count)
  local loads, found = {}, 0
  each_waiting(pool, function(id, need)
    local adapter = string.match(need, '|(.*)$')
    if adapter ~= '' and not loads[adapter] then
      loads[adapter], found = get(pool, id).source, found + 1
    end
    if found >= count then return true end
    return nil
  end)
  return loads
end

local function forget(pool, ticket, used)
  if ticket.state == TICKET.QUEUED then
    dequeue(pool, ticket)
  else
    if ticket.placed then charge(pool, ticket, (used and units(used) or 0) - charged(pool, ticket)) end
    let_go(pool, ticket)
  end
  settle(pool, ticket, used)
  drop(pool, ticket)
  redis.call('HDEL', pool.key .. ':progress', ticket.id)
  redis.call('ZREM', pool.key .. ':expiry', ticket.id)
  redis.call('HSET', pool.key .. ':vars', 'active', pool.now)
end

-- Back to the front of the queue; false if it has been delivered often enough. What it was charged is given back: nobody has had it.
local function requeue(pool, ticket, delivered)
  charge(pool, ticket, -charged(pool, ticket))
  redis.call('HDEL', pool.key .. ':progress', ticket.id)
  let_go(pool, ticket)
  if delivered then
    ticket.attempts = ticket.attempts + 1
    if ticket.attempts >= MAX_ATTEMPTS then
      ticket.state, ticket.placed, ticket.granted = TICKET.FAILED, nil, nil
      put(pool, ticket)
      return false
    end
  end
  enqueue(pool, ticket, true)
  return true
end

-- What was loading goes back, in the order in which it had waited.
local function requeue_loading(pool, tickets)
  table.sort(tickets, function(one, other)
    if one.sequence == other.sequence then return one.id < other.id end
    return one.sequence < other.sequence
  end)
  for _, ticket in ipairs(tickets) do requeue(pool, ticket, false) end
end

-- Take a replica out: what was loading waits again, what ran is told (its stream breaks, or is cut by its gateway).
local function remove(pool, id)
  pool.replicas[id] = nil
  pool.dirty[id] = true
  local loading = {}
  for _, ticket_id in ipairs(redis.call('HKEYS', pool.key .. ':tickets')) do
    local ticket = get(pool, ticket_id)
    if ticket and ticket.replica == id then
      if ticket.state == TICKET.LOADING then
        loading[#loading + 1] = ticket
      else
        -- It holds nothing any more, should a replica of this id come back.
        ticket.state, ticket.replica, ticket.held, ticket.revoked = TICKET.REVOKED, nil, nil, id
        put(pool, ticket)
        tell(ticket, TICKET.REVOKED)
      end
    end
  end
  requeue_loading(pool, loading)
end

-- The server's clock was set back: what lies in its future would hold for as long as the jump was.
local function clock_set_back(pool)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', pool.key .. ':expiry', pool.now + LEASE_MS, '+inf')) do
    redis.call('ZADD', pool.key .. ':expiry', pool.now + LEASE_MS, id)
  end
  local stored = redis.call('HGETALL', pool.key .. ':tickets')
  for i = 2, #stored, 2 do
    -- Else it would have waited, and run, for less than no time.
    local ticket = cjson.decode(stored[i])
    ticket.submitted = math.min(ticket.submitted, pool.now)
    ticket.placed = ticket.placed and math.min(ticket.placed, pool.now)
    ticket.granted = ticket.granted and math.min(ticket.granted, pool.now)
    put(pool, ticket)
  end
  for id, replica in pairs(pool.replicas) do
    replica.beat, replica.since = math.min(replica.beat, pool.now), math.min(replica.since, pool.now)
    replica.turn = replica.turn and math.min(replica.turn, pool.now)
    for adapter, time in pairs(replica.used) do replica.used[adapter] = math.min(time, pool.now) end
    pool.dirty[id] = true
  end
  for _, name in ipairs({ 'controller', 'active' }) do
    local time = var(pool, name, nil)
    if time then redis.call('HSET', pool.key .. ':vars', name, math.min(time, pool.now)) end
  end
  redis.call('HSET', pool.key .. ':vars', 'spare', pool.now + LEASE_MS)
end

-- Tickets of gateways that are gone are charged at their last checkpoint; replicas that are gone give their work back. Whether there
-- were any: then somebody else may have a turn.
local function reap(pool)
  -- Somebody calls every second. If nobody could for a while, this server was away, not everybody else: let them come back first.
  local last = var(pool, 'reaped', pool.now)
  redis.call('HSET', pool.key .. ':vars', 'reaped', pool.now)
  if pool.now < last then clock_set_back(pool) end
  if pool.now - last > AWAY_MS then redis.call('HSET', pool.key .. ':vars', 'spare', pool.now + LEASE_MS) end
  if pool.now < var(pool, 'spare', 0) then return false end
  local found = false
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', pool.key .. ':expiry', '-inf', pool.now, 'LIMIT', 0, MAX_REAPED)) do
    local ticket = get(pool, id)
    if ticket then
      local used = record_lost(pool, ticket)
      forget(pool, ticket, used)
      found = true
    else
      redis.call('ZREM', pool.key .. ':expiry', id)
    end
  end
  local gone = {}
  for id, replica in pairs(pool.replicas) do
    if pool.now - replica.beat > GONE_MS then gone[#gone + 1] = id end
  end
  table.sort(gone)
  for _, id in ipairs(gone) do remove(pool, id) end
  return found or #gone > 0
end
