-- Append entries and publish them; the last one may end the job, commit its turn and free its session, all or nothing.
-- KEYS: job, log, history, turn · ARGV: job id, fence, first sequence number, channel, terminal or '', turn or '', session ttl, entry …
-- Returns: {outcome, next, cancel}. Without entries it renews the lease. Sending the same again changes nothing.
local job = redis.call('HMGET', KEYS[1], 'state', 'fence', 'next', 'cancel', 'expire')
if not job[1] then
  return {'missing', 0, 0}
end
local next, from, count = tonumber(job[3]), tonumber(ARGV[3]), #ARGV - 7
if job[1] == 'done' then
  if job[2] == ARGV[2] and from + count <= next then
    return {'ok', next, 0}
  end
  return {'done', next, 0}
end
if job[1] ~= 'running' or job[2] ~= ARGV[2] then
  return {'fenced', next, 0}
end
if count > 0 and from > next then
  return {'gap', next, tonumber(job[4])}
end

local fresh = {}
for i = math.max(next - from + 1, 1), count do
  local entry = ARGV[7 + i]
  redis.call('XADD', KEYS[2], int(from + i - 1) .. '-0', 'e', entry)
  fresh[#fresh + 1] = entry
end
if #fresh > 0 and next == 1 then
  redis.call('PEXPIREAT', KEYS[2], job[5])
end
next = next + #fresh
redis.call('HSET', KEYS[1], 'next', int(next), 'renewed', int(now_ms()))
if ARGV[5] ~= '' then
  redis.call('HSET', KEYS[1], 'state', 'done', 'terminal', ARGV[5])
  if ARGV[6] ~= '' then
    redis.call('RPUSH', KEYS[3], ARGV[6])
    redis.call('PEXPIRE', KEYS[3], ARGV[7])
  end
  free_session(KEYS[4], ARGV[1])
end
if #fresh > 0 then
  redis.call('PUBLISH', ARGV[4], '[' .. table.concat(fresh, ',') .. ']')
end
return {'ok', next, tonumber(job[4])}
