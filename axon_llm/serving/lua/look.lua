-- Look at a job of the outbox. One that nobody holds is handed out, each time after twice as long a wait.
-- KEYS: job · ARGV: lease, grace
-- Returns: {'gone'} | {'held'} | {'idle', body, milliseconds since anything happened to it, 1 if past its deadline, 1 if a worker
-- had it and went silent, how often it was handed out before, 1 if it was published again since a worker had it}
local job = redis.call('HMGET', KEYS[1], 'state', 'renewed', 'created', 'looked', 'looks', 'deadline', 'body', 'again')
if not job[1] or job[1] == 'done' then
  return {'gone'}
end
local now = now_ms()
local late = now > tonumber(job[6])
if job[1] == 'running' and now < tonumber(job[2]) + tonumber(ARGV[1]) then
  return {'held'}
end
local looks = tonumber(job[5] or '0')
local since = math.max(tonumber(job[2]), tonumber(job[3]), tonumber(job[4] or '0'))
if not late and now - since < tonumber(ARGV[2]) * 2 ^ math.min(looks, 3) then
  return {'held'}
end
redis.call('HSET', KEYS[1], 'looked', int(now), 'looks', int(looks + 1))
return {'idle', job[7], now - since, late and 1 or 0, job[1] == 'running' and 1 or 0, looks,
  job[8] == '1' and 1 or 0}
