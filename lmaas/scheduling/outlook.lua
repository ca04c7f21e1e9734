-- What gateways are told of their tickets: positions, estimates and grants.

-- Returns how many ms are left of something that usually takes `usual` ms and has taken `elapsed`, and by how many ms it is late. If it
-- is late, the estimate is as long again as it is late, so that estimates never stand still.
local function left_of(usual, elapsed)
  return math.max(math.min(1000, usual), usual - elapsed, elapsed - usual), math.max(0, elapsed - usual)
end

-- Returns {left, late} of the start that will probably end first, by its supervisor's own report if there is one, or nil. Of many that
-- start, it considers the oldest.
local function next_start(pool, usual)
  local best = nil
  for _, id in ipairs(redis.call('ZRANGE', pool.at.starting, 0, MAX_CANDIDATES - 1)) do
    local replica = replica_of(pool, id)
    local left, late = left_of(usual, pool.now - replica.since)
    if replica.left then
      left, late = math.max(math.min(1000, replica.left), replica.left - (pool.now - beat_of(pool, replica))), replica.late or 0
    end
    if not best or left < best[1] or (left == best[1] and late < best[2]) then best = { left, late } end
  end
  return best
end

-- Returns what a waiting ticket waits for: {left, late, phase, slots, assumed}. `left` is how long the next turn or start probably takes.
local function outlook(pool)
  local slots = var(pool, 'slots', 0)
  if slots > 0 then
    local left, late = left_of(pool.vars.run_ms, pool.vars.turn > 0 and pool.now - pool.vars.turn or 0)
    return { left = left, late = late, phase = PHASE.BUSY, slots = slots, assumed = false }
  end
  local known = var(pool, 'start_ms', nil)
  local usual = known or var(pool, 'first_ms', START_MS)
  local start = next_start(pool, usual)
  if start then return { left = start[1], late = start[2], phase = PHASE.STARTING, slots = 16, assumed = not known } end
  -- No supervisor reports yet. An engine was asked for when the first ticket came.
  local first = redis.call('ZRANGE', pool.key .. ':queue', 0, 0)[1]
  local left, late = left_of(usual, first and pool.now - get(pool, first).submitted or 0)
  local delay = var(pool, 'delay_ms', 0) - (pool.now - pool.vars.controller)
  if delay > 0 then left, late = delay + usual, 0 end
  return { left = left, late = late, phase = PHASE.ASKED, slots = 16, assumed = not known }
end

-- Returns how long a ticket at this position may have to wait: {wait_ms, late_ms, phase, assumed}. `late_ms` is by how much the next
-- turn, or the start, is later than usual; of a start, both are its supervisor's own report if there is one. If `assumed`, no start of
-- this pool is known, and what the controller expects of a first start is used instead. The call must not change replicas any more.
local function estimate(pool, position)
  if not pool.outlook then
    index(pool)
    pool.outlook = outlook(pool)
  end
  local next_turn = pool.outlook
  return {
    wait_ms = math.floor(next_turn.left + (math.ceil(position / next_turn.slots) - 1) * pool.vars.run_ms),
    late_ms = next_turn.late, phase = next_turn.phase, assumed = next_turn.assumed,
  }
end

-- Returns, by a tenant's index in the order of service, how many of the other tenants' tickets go before its ticket with `rank` own
-- tickets before it. Turns are assumed to cost the same. Tenants beyond MAX_LINE count with one ticket each.
local function turns_of(line, rank)
  local turns, before, after = {}, 0, 0
  for i = 1, #line.lengths do
    turns[i], before = before, before + math.min(line.lengths[i], rank + 1)
  end
  for i = #line.lengths, 1, -1 do
    turns[i], after = turns[i] + after + line.more, after + math.min(line.lengths[i], rank)
  end
  turns.beyond = before + line.more - 1
  return turns
end

-- Returns a queued ticket's position in the order of service, from 1. It is behind the tickets that came back. The lengths of the queues
-- are read once a call, so the call must not change the queue any more.
local function position_of(pool, ticket)
  local front = redis.call('ZRANK', pool.key .. ':front', ticket.id)
  if front then return front + 1 end
  front = redis.call('ZCARD', pool.key .. ':front')
  local rank = redis.call('ZRANK', pool.key .. ':queue:' .. ticket.tenant, ticket.id)
  if rank == 0 then return front + redis.call('ZRANK', pool.key .. ':waiting', ticket.tenant) + 1 end
  local line = pool.line
  if not line then
    line = { index = {}, lengths = {}, turns = {}, more = math.max(0, redis.call('ZCARD', pool.key .. ':waiting') - MAX_LINE) }
    for i, tenant in ipairs(redis.call('ZRANGE', pool.key .. ':waiting', 0, MAX_LINE - 1)) do
      line.index[tenant], line.lengths[i] = i, redis.call('ZCARD', pool.key .. ':queue:' .. tenant)
    end
    pool.line = line
  end
  local turns = line.turns[rank]
  if not turns then
    turns = turns_of(line, rank)
    line.turns[rank] = turns
  end
  return front + rank + turns[line.index[ticket.tenant] or 'beyond'] + 1
end

-- Returns what a gateway is told of its ticket.
local function report(pool, ticket)
  if ticket.state == TICKET.QUEUED then
    -- Of a background ticket, the place in the order of arrival is enough.
    local position = ticket.background and redis.call('ZRANK', pool.background.key .. ':queue', ticket.id) + 1 or position_of(pool, ticket)
    local reply = estimate(pool, position)
    reply.state, reply.attempts, reply.position = TICKET.QUEUED, ticket.attempts, position
    return reply
  end
  if ticket.state == TICKET.GRANTED then
    local lease = lease_of(pool, ticket)
    lease.state, lease.attempts = TICKET.GRANTED, ticket.attempts
    return lease
  end
  return { state = ticket.state, attempts = ticket.attempts }
end

-- Wakes the controller if a ticket waits and no replica is ready or starting. It notices other changes of demand by itself.
local function ask_for_replica(pool)
  if pool.vars.queued == 0 then return end
  index(pool)
  if var(pool, 'able', 0) == 0 then redis.call('PUBLISH', 'lmaas:control', SIGNAL.DEMAND) end
end
