-- The order of service, by virtual token counters ("Fairness in Serving Large Language Models", OSDI'24). Of the tenants that wait, the one
-- with the smallest counter goes next. A counter grows by the tokens that were served, divided by the share of the tenant's tier: by the
-- estimated prompt tokens when a ticket is placed, then by what each checkpoint reports; the settlement corrects the rest. A tenant that
-- begins to wait is lifted to the smallest counter of those that wait, so that idling earns no credit.
-- Within a tenant, tickets are served in the order of arrival. A ticket of the service tier `priority` goes before some others
-- (`head_start`), one of `flex` after some others, but never before or after all.

local PROMPT_COST = 1
local COMPLETION_COST = 2
local BEHIND = 0.001
local MAX_COUNTERS = 10000

-- Returns the queue of a ticket. Interactive and background tickets have counters of their own, so that a tenant's batches do not cost its
-- other requests their turn.
local function line_of(pool, ticket)
  return ticket.background and pool.background or pool.interactive
end

local function counter_of(line, tenant)
  return tonumber(redis.call('ZSCORE', line.counters, tenant) or 0)
end

-- Returns the least counter that a tenant has when it begins to wait.
local function floor_of(pool, line)
  local smallest = redis.call('ZRANGE', line.key .. ':waiting', 0, 0, 'WITHSCORES')
  if smallest[2] then return tonumber(smallest[2]) end
  local last = text_of(pool, line.last)
  return math.max(var(pool, line.floor, 0), last ~= '' and counter_of(line, last) or 0)
end

local function charge(pool, ticket, units)
  if units == 0 then return end
  local line = line_of(pool, ticket)
  local counter = tonumber(redis.call('ZINCRBY', line.counters, units / ticket.share, ticket.tenant))
  if counter < 0 then
    counter = 0
    redis.call('ZADD', line.counters, 0, ticket.tenant)
  end
  if not nothing_waits(pool) then redis.call('ZADD', line.key .. ':waiting', 'XX', counter, ticket.tenant) end
end

local function units(tokens)
  return PROMPT_COST * tokens.prompt + COMPLETION_COST * tokens.completion
end

-- Returns what a placed ticket has been charged so far, and whether it is known that it has no checkpoint. What was put back got its
-- charge back.
local function charged(pool, ticket)
  if not ticket.placed or ticket.state == TICKET.YIELDED then return 0 end
  local tokens = progress(pool, ticket)
  return tokens and units(tokens) or PROMPT_COST * ticket.prompt_tokens, not tokens
end

-- Drops the counters below the floor, whose tenants would be lifted to it anyway.
local function drop_counters(pool, line, floor)
  set_var(pool, line.floor, floor)
  redis.call('ZREMRANGEBYSCORE', line.counters, '-inf', '(' .. string.format('%.17g', floor))
end

-- Lifts the counter of a tenant that begins to wait to the least of those that wait, plus `behind`.
local function lift(pool, line, tenant, behind)
  redis.call('ZADD', line.counters, math.max(counter_of(line, tenant), floor_of(pool, line) + behind), tenant)
  if redis.call('ZCARD', line.counters) > MAX_COUNTERS then drop_counters(pool, line, floor_of(pool, line)) end
end

-- Lets a tenant begin to wait.
local function line_up(pool, line, tenant)
  -- It goes behind those that wait already. Otherwise an endless stream of newcomers could stay before the first of them.
  lift(pool, line, tenant, redis.call('EXISTS', line.key .. ':waiting') == 1 and BEHIND or 0)
  redis.call('ZADD', line.key .. ':waiting', counter_of(line, tenant), tenant)
end

-- Leaves the same state as if the ticket had been queued, dequeued and charged: no interactive ticket waits, so its turn comes at once.
local function pass_through(pool, ticket)
  local vars, counters, tenant = pool.vars, pool.interactive.counters, ticket.tenant
  local last = vars.last
  ticket.sequence = next_of(pool, 'seq')
  local found = redis.call('ZMSCORE', counters, tenant, last)
  local floor = math.max(vars.floor, tonumber(found[2] or 0))
  local counter = math.max(tonumber(found[1] or 0), floor)
  redis.call('ZADD', counters, counter + PROMPT_COST * ticket.prompt_tokens / ticket.share, tenant)
  if redis.call('ZCARD', counters) > MAX_COUNTERS then drop_counters(pool, pool.interactive, last == tenant and counter or floor) end
  set_var(pool, 'last', tenant)
end

-- Queues a ticket. With `front`, it came back and goes before all that did not, in the order in which they came back.
local function enqueue(pool, ticket, front)
  local line, sequence = line_of(pool, ticket), next_of(pool, 'seq')
  local queue = line.key .. ':queue:' .. ticket.tenant
  ticket.sequence = front and -1 / sequence or sequence
  if front then
    redis.call('ZADD', line.key .. ':front', ticket.sequence, ticket.id)
  else
    if redis.call('EXISTS', queue) == 0 then line_up(pool, line, ticket.tenant) end
    redis.call('ZADD', queue, redis.call('HINCRBY', line.key .. ':sequences', ticket.tenant, 1) - ticket.head_start, ticket.id)
  end
  ticket.state, ticket.placed, ticket.granted, ticket.revoked = TICKET.QUEUED, nil, nil, nil
  put(pool, ticket)
  set_var(pool, line.queued, var(pool, line.queued) + 1)
  redis.call('ZADD', line.key .. ':queue', ticket.sequence, ticket.id)
  redis.call('HSET', line.key .. ':needs', ticket.id, needs_of(ticket))
end

local function dequeue(pool, ticket)
  local line = line_of(pool, ticket)
  local queue = line.key .. ':queue:' .. ticket.tenant
  redis.call('ZREM', line.key .. ':queue', ticket.id)
  set_var(pool, line.queued, var(pool, line.queued) - 1)
  redis.call('HDEL', line.key .. ':needs', ticket.id)
  redis.call('HDEL', line.key .. ':passed', ticket.id)
  if redis.call('ZREM', line.key .. ':front', ticket.id) == 1 then return end
  redis.call('ZREM', queue, ticket.id)
  if redis.call('EXISTS', queue) == 0 then
    redis.call('ZREM', line.key .. ':waiting', ticket.tenant)
    redis.call('HDEL', line.key .. ':sequences', ticket.tenant)
    set_var(pool, line.last, ticket.tenant)
  end
end
