-- Whose turn it is: virtual token counters ("Fairness in Serving Large Language Models", OSDI'24). Of the tenants that wait, the one
-- whose counter is smallest goes next. A counter grows by the tokens that were served, divided by the share of the tenant's tier:
-- prompt tokens when a ticket is placed, by estimate; then by what each checkpoint reports; the settlement corrects the rest. A tenant that
-- begins to wait is lifted to the smallest counter of those that wait, so that idling earns no credit.
-- Within a tenant, first come, first served; a ticket of the service tier `priority` goes before, one of `flex` after, some others
-- (`head_start`), never all.

local PROMPT_COST = 1
local COMPLETION_COST = 2
local SEQUENCE_FROM = 1000 -- sequences below 0 are of tickets that came back
local MAX_COUNTERS = 10000

local function counter_of(pool, tenant)
  return tonumber(redis.call('ZSCORE', pool.key .. ':counters', tenant) or 0)
end

-- The counter that a tenant has at least when it begins to wait.
local function floor_of(pool)
  local first = redis.call('ZRANGEBYSCORE', pool.key .. ':waiting', 0, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  local smallest = first[2] and tonumber(first[2])
  -- Those whose first ticket came back wait too; their counters are elsewhere.
  for _, tenant in ipairs(redis.call('ZRANGEBYSCORE', pool.key .. ':waiting', '-inf', '(0')) do
    smallest = math.min(smallest or math.huge, counter_of(pool, tenant))
  end
  if smallest then return smallest end
  local last = redis.call('HGET', pool.key .. ':vars', 'last')
  return math.max(var(pool, 'floor', 0), last and counter_of(pool, last) or 0)
end

-- Who waits has its counter as its place in line, or if its first ticket came back, that ticket's place before all others.
local function stand_in_line(pool, tenant)
  local head = redis.call('ZRANGE', pool.key .. ':queue:' .. tenant, 0, 0, 'WITHSCORES')
  if not head[1] then
    redis.call('ZREM', pool.key .. ':waiting', tenant)
    return false
  end
  redis.call('ZADD', pool.key .. ':waiting', tonumber(head[2]) < 0 and head[2] or counter_of(pool, tenant), tenant)
  return true
end

local function charge(pool, ticket, units)
  if units == 0 then return end
  local counter = tonumber(redis.call('ZINCRBY', pool.key .. ':counters', units / ticket.share, ticket.tenant))
  if counter < 0 then redis.call('ZADD', pool.key .. ':counters', 0, ticket.tenant) end
  if redis.call('EXISTS', pool.key .. ':queue:' .. ticket.tenant) == 1 then stand_in_line(pool, ticket.tenant) end
end

local function units(tokens)
  return PROMPT_COST * tokens.prompt + COMPLETION_COST * tokens.completion
end

-- What a placed ticket has been charged so far.
local function charged(pool, ticket)
  if not ticket.placed then return 0 end
  local tokens = progress(pool, ticket)
  return tokens and units(tokens) or PROMPT_COST * ticket.prompt_tokens
end

local function enqueue(pool, ticket, front)
  local sequence = redis.call('HINCRBY', pool.key .. ':vars', 'seq', 1)
  if front then
    sequence = -1 / sequence -- before every other; among themselves in the order in which they came back
  else
    sequence = SEQUENCE_FROM + sequence - ticket.head_start
  end
  if redis.call('EXISTS', pool.key .. ':queue:' .. ticket.tenant) == 0 then
    local lifted = math.max(counter_of(pool, ticket.tenant), floor_of(pool))
    redis.call('ZADD', pool.key .. ':counters', lifted, ticket.tenant)
    if redis.call('ZCARD', pool.key .. ':counters') > MAX_COUNTERS then
      -- Whoever has less than the floor would be lifted to it anyway.
      local floor = floor_of(pool)
      redis.call('HSET', pool.key .. ':vars', 'floor', floor)
      redis.call('ZREMRANGEBYSCORE', pool.key .. ':counters', '-inf', '(' .. floor)
    end
  end
  ticket.state, ticket.placed, ticket.granted, ticket.revoked = 'queued', nil, nil, nil
  ticket.sequence = sequence
  put(pool, ticket)
  redis.call('ZADD', pool.key .. ':queue', sequence, ticket.id)
  redis.call('ZADD', pool.key .. ':queue:' .. ticket.tenant, sequence, ticket.id)
  redis.call('HSET', pool.key .. ':needs', ticket.id, ticket.weight .. '|' .. ticket.adapter)
  stand_in_line(pool, ticket.tenant)
end

local function dequeue(pool, ticket)
  redis.call('ZREM', pool.key .. ':queue', ticket.id)
  redis.call('ZREM', pool.key .. ':queue:' .. ticket.tenant, ticket.id)
  redis.call('HDEL', pool.key .. ':needs', ticket.id)
  redis.call('HDEL', pool.key .. ':passed', ticket.id)
  if not stand_in_line(pool, ticket.tenant) then redis.call('HSET', pool.key .. ':vars', 'last', ticket.tenant) end
end
