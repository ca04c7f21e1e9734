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
local MAX_REAPED = 100    -- tickets of lost gateways that one call ends; the next call continues

-- Returns whether a replica gets new work.
local function fresh(pool, replica)
  return replica.state == REPLICA.READY and not replica.suspect and pool.now - replica.beat < STALE_MS
end

local function hold(pool, ticket, replica)
  -- A ticket that needs more slots than the replica has takes all of them. The next replica may have more.
  ticket.held = math.min(ticket.weight, replica.slots)
  -- `turn` is when a slot was last taken. It shows waiting tickets whether turns take longer than usual.
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

-- Returns whether a replica is open to a ticket, although something may be kept free there for tickets that have waited for too long.
-- `kept` is replica id → {whole, victims: {adapter}, holders: {adapter}}. The adapter slots of the victims are emptied for the holders.
local function left_by(kept, replica, adapter)
  local here = kept[replica.id]
  if not here then return true end
  if here.whole then return false end
  if adapter == '' then return true end
  if replica.running[adapter] then return not here.victims[adapter] end
  return here.holders[adapter] or false
end

-- Returns the replica for a ticket: first where its adapter runs, then where it is resident, then where an adapter slot is free; among
-- equals the least loaded, then the first by name.
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

-- Keeps an adapter slot free: the one with the fewest requests, which is probably empty first. Returns whether there was one.
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

-- Keeps a whole replica free: the one with the most room. Returns whether there was one.
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

-- Places a ticket that is not in the queue (any more) on a replica.
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

-- Calls `visit` for queued tickets in the order of service, until it returns something: first tickets that came back, then tenant by
-- tenant. Its arguments are the ticket's id, its needs, how many tickets had been placed when it was first passed over (nil: never), and
-- after how many placements in fair turns its tenant would have no waiting ticket (at most MAX_TURNS).
local function each_waiting(pool, visit)
  local visits = 0
  local function visit_all(ids, turns)
    if #ids == 0 then return nil end
    local needs = redis.call('HMGET', pool.key .. ':needs', unpack(ids))
    local passed = redis.call('HMGET', pool.key .. ':passed', unpack(ids))
    for i, id in ipairs(ids) do
      visits = visits + 1
      if visits > MAX_VISITS then return nil end
      local found = visit(id, needs[i], tonumber(passed[i] or nil), turns)
      if found ~= nil then return found end
    end
    return nil
  end
  local found = visit_all(redis.call('ZRANGE', pool.key .. ':front', 0, MAX_VISITS - 1), 0)
  if found ~= nil then return found end
  local tenants = redis.call('ZRANGE', pool.key .. ':waiting', 0, MAX_TENANTS - 1)
  for _, tenant in ipairs(tenants) do
    local ids = redis.call('ZRANGE', pool.key .. ':queue:' .. tenant, 0, MAX_DEPTH - 1)
    found = visit_all(ids, math.min(MAX_TURNS, #ids * #tenants))
    if found ~= nil then return found end
    if visits > MAX_VISITS then return nil end
  end
  return nil
end

-- Places the first ticket that fits. Returns false if none does.
local function place_next(pool, caller)
  local placed = var(pool, 'placed', 0)
  local replicas, newly_passed, kept, asked = {}, {}, {}, {}
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

-- Grants every slot that can be granted.
local function dispatch(pool, caller)
  for _ = 1, redis.call('ZCARD', pool.key .. ':queue') do
    local free = false
    for _, replica in pairs(pool.replicas) do free = free or (fresh(pool, replica) and replica.load < replica.slots) end
    if not free or not place_next(pool, caller) then return end
  end
end

-- Places a new ticket if no ticket waits and there is room, with the same result as queueing and dispatching it. Returns false otherwise.
local function place_at_once(pool, ticket)
  if redis.call('ZCARD', pool.key .. ':queue') > 0 then return false end
  local replica = choose(pool, ticket.weight, ticket.adapter, {})
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

-- Ends a ticket: frees what it holds, and settles it to the tokens that it used (nil: none).
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

-- Puts a ticket back at the front of the queue. Returns false if it has been delivered as often as it may be. What it was charged is
-- given back, since its client has received nothing.
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

-- Puts tickets whose adapter was loading back, in the order in which they had waited.
local function requeue_loading(pool, tickets)
  table.sort(tickets, function(one, other)
    if one.sequence == other.sequence then return one.id < other.id end
    return one.sequence < other.sequence
  end)
  for _, ticket in ipairs(tickets) do requeue(pool, ticket, false) end
end

-- Removes a replica. Tickets whose adapter was loading wait again. The gateways of those that ran are told: their streams break, or the
-- gateways cut them.
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
        -- It holds nothing any more, even if a replica with this id comes back.
        ticket.state, ticket.replica, ticket.held, ticket.revoked = TICKET.REVOKED, nil, nil, id
        put(pool, ticket)
        tell(ticket, TICKET.REVOKED)
      end
    end
  end
  requeue_loading(pool, loading)
end

-- Corrects times after the server's clock was set back: those in the future would otherwise hold for as long as the jump was.
local function clock_set_back(pool)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', pool.key .. ':expiry', pool.now + LEASE_MS, '+inf')) do
    redis.call('ZADD', pool.key .. ':expiry', pool.now + LEASE_MS, id)
  end
  local stored = redis.call('HGETALL', pool.key .. ':tickets')
  for i = 2, #stored, 2 do
    -- Otherwise its waiting and running times would be negative.
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

-- Ends tickets of gateways that are gone, charged at their last checkpoint, and removes replicas that are gone. Returns whether there
-- were any, since others may have a turn then.
local function reap(pool)
  -- There is a call every second. If there was none for a while, this server was away, not all its clients: they get time to come back.
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
