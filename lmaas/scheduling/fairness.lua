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

local function counter_of(pool, tenant)
  return tonumber(redis.call('ZSCORE', pool.key .. ':counters', tenant) or 0)
end

-- Returns the least counter that a tenant has when it begins to wait.
local function floor_of(pool)
  local smallest = redis.call('ZRANGE', pool.key .. ':waiting', 0, 0, 'WITHSCORES')
  if smallest[2] then return tonumber(smallest[2]) end
  local last = text_of(pool, 'last')
  return math.max(var(pool, 'floor', 0), last and counter_of(pool, last) or 0)
end

local function charge(pool, ticket, units)
  if units == 0 then return end
  local counter = tonumber(redis.call('ZINCRBY', pool.key .. ':counters', units / ticket.share, ticket.tenant))
  if counter < 0 then
    counter = 0
    redis.call('ZADD', pool.key .. ':counters', 0, ticket.tenant)
  end
  redis.call('ZADD', pool.key .. ':waiting', 'XX', counter, ticket.tenant)
end

local function units(tokens)
  return PROMPT_COST * tokens.prompt + COMPLETION_COST * tokens.completion
end

-- Returns what a placed ticket has been charged so far.
local function charged(pool, ticket)
  if not ticket.placed then return 0 end
  local tokens = progress(pool, ticket)
  return tokens and units(tokens) or PROMPT_COST * ticket.prompt_tokens
end

-- Lifts the counter of a tenant that begins to wait to the least of those that wait, plus `behind`.
local function lift(pool, tenant, behind)
  local counter = math.max(counter_of(pool, tenant), floor_of(pool) + behind)
  redis.call('ZADD', pool.key .. ':counters', counter, tenant)
  if redis.call('ZCARD', pool.key .. ':counters') > MAX_COUNTERS then
    -- Counters below the floor can be dropped: their tenants would be lifted to it anyway.
    local floor = floor_of(pool)
    set_var(pool, 'floor', floor)
    redis.call('ZREMRANGEBYSCORE', pool.key .. ':counters', '-inf', '(' .. string.format('%.17g', floor))
  end
end

-- Lets a tenant begin to wait.
local function line_up(pool, tenant)
  -- It goes behind those that wait already. Otherwise an endless stream of newcomers could stay before the first of them.
  lift(pool, tenant, redis.call('EXISTS', pool.key .. ':waiting') == 1 and BEHIND or 0)
  redis.call('ZADD', pool.key .. ':waiting', counter_of(pool, tenant), tenant)
end

-- Leaves the same state as if the ticket had been queued and dequeued: no ticket waits, so its turn comes at once.
local function pass_through(pool, ticket)
  ticket.sequence = next_of(pool, 'seq')
  lift(pool, ticket.tenant, 0)
  set_var(pool, 'last', ticket.tenant)
end

-- Queues a ticket. With `front`, it came back and goes before all that did not, in the order in which they came back.
local function enqueue(pool, ticket, front)
  local sequence, queue = next_of(pool, 'seq'), pool.key .. ':queue:' .. ticket.tenant
  ticket.sequence = front and -1 / sequence or sequence
  if front then
    redis.call('ZADD', pool.key .. ':front', ticket.sequence, ticket.id)
  else
    if redis.call('EXISTS', queue) == 0 then line_up(pool, ticket.tenant) end
    redis.call('ZADD', queue, redis.call('HINCRBY', pool.key .. ':sequences', ticket.tenant, 1) - ticket.head_start, ticket.id)
  end
  ticket.state, ticket.placed, ticket.granted, ticket.revoked = TICKET.QUEUED, nil, nil, nil
  put(pool, ticket)
  redis.call('ZADD', pool.key .. ':queue', ticket.sequence, ticket.id)
  redis.call('HSET', pool.key .. ':needs', ticket.id, needs_of(ticket))
end

local function dequeue(pool, ticket)
  local queue = pool.key .. ':queue:' .. ticket.tenant
  redis.call('ZREM', pool.key .. ':queue', ticket.id)
  redis.call('HDEL', pool.key .. ':needs', ticket.id)
  redis.call('HDEL', pool.key .. ':passed', ticket.id)
  if redis.call('ZREM', pool.key .. ':front', ticket.id) == 1 then return end
  redis.call('ZREM', queue, ticket.id)
  if redis.call('EXISTS', queue) == 0 then
    redis.call('ZREM', pool.key .. ':waiting', ticket.tenant)
    redis.call('HDEL', pool.key .. ':sequences', ticket.tenant)
    set_var(pool, 'last', ticket.tenant)
  end
end
