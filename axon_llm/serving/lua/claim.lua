-- Become the one writer of a job, if nobody living is.
-- KEYS: job, log, turn · ARGV: job id, worker id, redelivered 0/1, solo 0/1, lease, silence, suspect attempt, max attempts,
--   terminal for a job that used up its attempts, channel, body, model, trace, created, deadline, expire, has session 0/1
-- Returns: {outcome, fence, attempt, cancel, retry after, entry, entry, …}
local now = now_ms()
local job = redis.call('HMGET', KEYS[1], 'state', 'fence', 'attempt', 'holder', 'renewed', 'cancel')
local state = job[1]
if not state then
  -- The store lost the job, the broker did not. Past its deadline it may also have ended and expired: leave it.
  if tonumber(ARGV[15]) <= now then
    return {'done', '0', 0, 0, 0}
  end
  create(KEYS[1], KEYS[2], ARGV[11], ARGV[1], ARGV[12], ARGV[13], ARGV[14], ARGV[15], ARGV[16])
  if ARGV[17] == '1' then
    redis.call('SET', KEYS[3], ARGV[1], 'PXAT', ARGV[16], 'NX')
  end
  job = {'queued', '0', '0', false, '0', '0'}
  state = 'queued'
end
if state == 'done' then
  return {'done', '0', 0, 0, 0}
end

local attempt = math.max(tonumber(job[3]), 1)
if state == 'running' and job[4] ~= ARGV[2] then
  local limit = tonumber(ARGV[5])
  if ARGV[3] == '1' then
    limit = tonumber(ARGV[6])
  end
  local left = tonumber(job[5]) + limit - now
  if left > 0 then
    if ARGV[3] == '1' then
      return {'busy', '0', attempt, 0, left}
    end
    return {'duplicate', '0', attempt, 0, 0}
  end
  attempt = attempt + 1
  if attempt >= tonumber(ARGV[8]) then
    redis.call('HSET', KEYS[1], 'attempt', attempt)
    close(KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[10], ARGV[9], now)
    return {'failed', '0', attempt, 0, 0}
  end
end
if attempt >= tonumber(ARGV[7]) and ARGV[4] == '0' then
  redis.call('HSET', KEYS[1], 'attempt', attempt, 'state', 'suspect', 'renewed', int(now))
  return {'suspect', '0', attempt, 0, 0}
end

local fence = next_fence(job[2], now)
redis.call('HSET', KEYS[1], 'state', 'running', 'fence', fence, 'attempt', attempt, 'holder', ARGV[2], 'renewed', int(now),
  'looks', '0', 'again', '0')
local reply = {'run', fence, attempt, tonumber(job[6]), 0}
for _, item in ipairs(redis.call('XRANGE', KEYS[2], '-', '+')) do
  reply[#reply + 1] = item[2][2]
end
return reply
