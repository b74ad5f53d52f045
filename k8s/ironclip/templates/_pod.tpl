{{/* Parts of the service's pod. */}}

{{- define "ironclip.env" -}}
{{- $v := .Values -}}
{{- /* Torch and the decoders would take all cores of the node, whatever the pod may use. */ -}}
{{- $source := "" -}}
{{- if dig "limits" "cpu" "" $v.resources -}}{{- $source = "limits.cpu" -}}
{{- else if dig "requests" "cpu" "" $v.resources -}}{{- $source = "requests.cpu" -}}{{- end -}}
{{- range $name := list "threads" "decode_workers" -}}
{{- if and $source (not (hasKey $v.settings $name)) }}
- name: IRONCLIP_{{ upper $name }}
  valueFrom:
    resourceFieldRef: {containerName: ironclip, resource: {{ $source }}, divisor: "1"}
{{- end -}}
{{- end -}}
{{- if ne $v.redis.mode "none" }}
- name: IRONCLIP_REDIS_URL
  valueFrom:
    secretKeyRef: {name: {{ include "ironclip.redisSecret" . }}, key: redis-url}
- name: IRONCLIP_REDIS_MAC_KEY
  valueFrom:
    secretKeyRef: {name: {{ include "ironclip.redisSecret" . }}, key: redis-mac-key}
{{- end -}}
{{- if and $v.hub.enabled $v.hub.tokenSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ $v.hub.tokenSecret }}, key: HF_TOKEN}
{{- end -}}
{{- with $v.extraEnv }}
{{ toYaml . }}
{{- end -}}
{{- end -}}

{{/* Bytes that the pod may put on the node's disk; small folders and those in memory apart. */}}
{{- define "ironclip.diskBytes" -}}
{{- $v := .Values -}}
{{- $hub := ternary $v.hub.sizeLimit "0" (and $v.hub.enabled (not $v.hub.cacheClaim)) -}}
{{- $models := ternary $v.models.init.sizeLimit "0" (eq $v.models.source "init") -}}
{{- add (include "ironclip.bytes" $hub | int64) (include "ironclip.bytes" $models | int64) -}}
{{- end -}}

{{/* Call with (dict "resources" ... "gpu" "nvidia.com/gpu" or "" "count" 1), and "disk" with bytes of it or without. */}}
{{- define "ironclip.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if gt (int64 .disk) 0 -}}
{{- /* Else the node may be full of others' files before these are written, and the pod is evicted for it. */ -}}
{{- $_ := set $resources "requests" (merge (default dict $resources.requests) (dict "ephemeral-storage" .disk)) -}}
{{- end -}}
{{- if and .gpu (gt (int .count) 0) -}}
{{- $_ := set $resources "limits" (merge (dict .gpu (int .count)) (default dict $resources.limits)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "ironclip.volumes" -}}
{{- $v := .Values -}}
- name: tmp
  emptyDir: {medium: Memory, sizeLimit: {{ $v.tmp.sizeLimit }}}
- name: state
  {{- if $v.state.existingClaim }}
  persistentVolumeClaim: {claimName: {{ $v.state.existingClaim }}}
  {{- else }}
  emptyDir: {sizeLimit: {{ $v.state.sizeLimit }}}
  {{- end }}
- name: cache
  {{- if and $v.hub.enabled $v.hub.cacheClaim }}
  persistentVolumeClaim: {claimName: {{ $v.hub.cacheClaim }}}
  {{- else }}
  emptyDir: {sizeLimit: {{ ternary $v.hub.sizeLimit "64Mi" $v.hub.enabled }}}
  {{- end }}
{{- with include "ironclip.keysSecret" . }}
- name: keys
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    items:
      - {key: {{ $v.keys.secretKey }}, path: keys.toml}
{{- end }}
{{- if eq $v.models.source "pvc" }}
- name: models
  persistentVolumeClaim: {claimName: {{ $v.models.pvc.claimName }}, readOnly: true}
{{- else if eq $v.models.source "init" }}
- name: models
  emptyDir: {sizeLimit: {{ $v.models.init.sizeLimit }}}
{{- else if eq $v.models.source "image" }}
- name: models
  image: {reference: {{ $v.models.image.reference }}, pullPolicy: {{ $v.models.image.pullPolicy }}}
{{- end }}
{{- with $v.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}
