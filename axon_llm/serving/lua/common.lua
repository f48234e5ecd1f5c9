-- Joined in front of every other script of this folder. Times are milliseconds of the server's clock.
--
-- A job is a hash: state (queued, running, released, suspect, done) · fence (only its bearer may append) · next (sequence number of
-- the next entry) · attempt (1, plus one for every take-over) · holder · renewed (when the holder was last heard of) · cancel ·
-- deadline · expire · body · model · trace · created · call (a token of the call that submitted it, to
-- recognise its repetition) · looked, looks (when and how often it was handed out as lost) · again (published again) · terminal.
-- Every script refuses to start when memory is full (none is flagged allow-oom), so that none is left half done.

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function int(number)
  return string.format('%.0f', number)
end

-- A fence grows even if an older state of the job was restored: it is never below the clock.
local function next_fence(fence, now)
  return int(math.max(tonumber(fence or '0') + 1, now))
end

-- Give up the session's running turn if it is this job's.
local function free_session(turn_key, job_id)
  if redis.call('GET', turn_key) == job_id then
    redis.call('DEL', turn_key)
  end
end

-- Close a job from outside the worker: one terminal entry, published; whoever still writes is fenced off.
local function close(job_key, log_key, turn_key, job_id, channel, terminal, now)
  local job = redis.call('HMGET', job_key, 'next', 'fence', 'expire')
  local seq = job[1]
  local entry = '{"seq":' .. seq .. ',"terminal":' .. terminal .. '}'
  redis.call('HSET', job_key, 'state', 'done', 'terminal', terminal, 'next', int(tonumber(seq) + 1),
    'fence', next_fence(job[2], now))
  redis.call('XADD', log_key, seq .. '-0', 'e', entry)
  redis.call('PEXPIREAT', log_key, job[3])
  free_session(turn_key, job_id)
  redis.call('PUBLISH', channel, '[' .. entry .. ']')
end

local function create(job_key, log_key, body, job_id, model, trace, created, deadline, expire)
  redis.call('HSET', job_key, 'state', 'queued', 'fence', '0', 'next', '1', 'attempt', '0', 'renewed', '0', 'cancel', '0',
    'body', body, 'model', model, 'trace', trace, 'created', created, 'deadline', deadline, 'expire', expire)
  redis.call('PEXPIREAT', job_key, expire)
  redis.call('DEL', log_key)
end
