-- Whose ticket is placed next, and where.

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
local PORTION = 16        -- tenants or tickets that are read at once, but first only FEW: mostly the first one fits
local FEW = 2

-- Lets a ticket's gateway have its slot.
local function grant(pool, ticket)
  ticket.state, ticket.granted = TICKET.GRANTED, pool.now
  put(pool, ticket)
end

-- Returns what a gateway is told of a granted ticket.
local function lease_of(pool, ticket)
  return {
    replica = ticket.replica, url = url_of(replica_of(pool, ticket.replica)), queue_ms = ticket.placed - ticket.submitted,
    load_ms = ticket.granted - ticket.placed,
  }
end

-- Places a ticket that is not in the queue (any more) on a replica. With `paid`, it has been charged for its prompt; with `resident`, its
-- adapter is known to be there.
local function place(pool, ticket, replica, caller, paid, resident)
  next_of(pool, line_of(pool, ticket).placed)
  ticket.placed = pool.now
  if not paid then charge(pool, ticket, PROMPT_COST * ticket.prompt_tokens) end
  hold(pool, ticket, replica)
  if ticket.adapter == '' or resident or is_resident(pool, replica, ticket.adapter) then
    grant(pool, ticket)
    if ticket.id ~= caller then tell(ticket, TICKET.GRANTED, lease_of(pool, ticket)) end
    return
  end
  ticket.state = TICKET.LOADING
  put(pool, ticket)
  if redis.call('HSETNX', pool.key .. ':loading:' .. replica.id, ticket.adapter, ticket.source) == 1 then
    set_var(pool, 'loading', pool.vars.loading + 1)
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

-- Calls `visit` for the tickets of a queue in the order of service, until it returns something: first tickets that came back, then tenant
-- by tenant. Its arguments are the ticket's id, its needs, how many tickets had been placed when it was first passed over (nil: never), and
-- after how many placements in fair turns its tenant would have no waiting ticket (at most MAX_TURNS).
local function each_waiting(line, visit)
  local visits, turns = 0, 0
  local function visit_all(ids)
    local needs = redis.call('HMGET', line.key .. ':needs', unpack(ids))
    local passed = redis.call('HMGET', line.key .. ':passed', unpack(ids))
    for i, id in ipairs(ids) do
      visits = visits + 1
      if visits > MAX_VISITS then return false end
      local found = visit(id, needs[i], tonumber(passed[i] or nil), turns)
      if found ~= nil then return found end
    end
    return nil
  end
  local found = in_portions(line.key .. ':front', MAX_VISITS, visit_all)
  if found == nil then
    local count = math.min(MAX_TENANTS, redis.call('ZCARD', line.key .. ':waiting'))
    found = in_portions(line.key .. ':waiting', count, function(tenants)
      for _, tenant in ipairs(tenants) do
        local queue = line.key .. ':queue:' .. tenant
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

-- Places the first ticket of a queue that fits. Returns false if none does.
local function place_next(pool, line, caller)
  local placed = var(pool, line.placed, 0)
  local bounds = line.is_background and bounds_of_background(pool) or nil
  local replicas, newly_passed, kept, asked = {}, {}, nothing_kept(), {}
  local found = each_waiting(line, function(id, need, passed_at, turns)
    local replica = replicas[need]
    if replica == nil then
      local weight, adapter = weight_and_adapter(need)
      replica = choose(pool, weight, adapter, kept, bounds) or (not line.is_background and make_room(pool, weight, adapter, kept)) or false
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
  for _, id in ipairs(newly_passed) do redis.call('HSET', line.key .. ':passed', id, placed) end
  local ticket = get(pool, found.id)
  dequeue(pool, ticket)
  place(pool, ticket, found.replica, caller)
  return true
end

-- Returns whether any replica may have room for an interactive ticket.
local function has_room(pool)
  sweep(pool)
  index(pool)
  return redis.call('EXISTS', pool.at.free, pool.at.yielding) > 0
end

-- Returns whether a replica may have room for a background ticket.
local function has_room_for_background(pool)
  sweep(pool)
  index(pool)
  return bounds_of_background(pool) ~= nil
end

-- Grants every slot that can be granted: to background tickets if no interactive one waits.
local function dispatch(pool, caller)
  if nothing_waits(pool) then return end
  for _ = 1, pool.vars.queued do
    if not has_room(pool) or not place_next(pool, pool.interactive, caller) then return end
  end
  for _ = 1, math.min(MAX_BACKGROUND_PLACED, pool.vars.background_queued) do
    if not has_room_for_background(pool) or not place_next(pool, pool.background, caller) then return end
  end
end

-- Places a new interactive ticket if none waits and there is room, with the same result as queueing and dispatching it. Returns false
-- otherwise.
local function place_at_once(pool, ticket)
  if ticket.background or pool.vars.queued > 0 then return false end
  local replica, resident = choose(pool, ticket.weight, ticket.adapter, NOTHING_KEPT)
  if not replica then return false end
  pass_through(pool, ticket)
  place(pool, ticket, replica, ticket.id, true, resident)
  return true
end

-- Returns the adapters that the queues need first (adapter → source), as many as run at once.
local function awaited(pool, count)
  local loads, found = {}, 0
  for _, line in ipairs({ pool.interactive, pool.background }) do
    each_waiting(line, function(id, need)
      if found >= count then return true end
      local _, adapter = weight_and_adapter(need)
      if adapter ~= '' and not loads[adapter] then
        loads[adapter], found = get(pool, id).source, found + 1
      end
      return nil
    end)
  end
  return loads
end
