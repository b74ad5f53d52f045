{{/* Names, labels and small pieces that several templates share. */}}

{{- define "ironclip.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* 40 characters: the longest suffix, a StatefulSet's pod or a Job's hash, must fit into 63. */}}
{{- define "ironclip.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "ironclip.name" . -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Call with (dict "root" $ "component" "service"). */}}
{{- define "ironclip.selectorLabels" -}}
app.kubernetes.io/name: {{ include "ironclip.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "ironclip.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "ironclip.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: ironclip
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of pods that a new version of the chart must not start anew. Call as selectorLabels. */}}
{{- define "ironclip.podLabels" -}}
{{ include "ironclip.selectorLabels" . }}
app.kubernetes.io/part-of: ironclip
{{- end -}}

{{/* Call with (dict "image" .Values.image "default" .Chart.AppVersion). */}}
{{- define "ironclip.image" -}}
{{- if .image.digest -}}
{{- printf "%s@%s" .image.repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" .image.repository (.image.tag | default .default) -}}
{{- end -}}
{{- end -}}

{{- define "ironclip.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "ironclip.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "ironclip.keysSecret" -}}
{{- .Values.keys.existingSecret | default (ternary (printf "%s-keys" (include "ironclip.fullname" .)) "" (ne .Values.keys.file "")) -}}
{{- end -}}

{{- define "ironclip.redisSecret" -}}
{{- .Values.redis.existingSecret | default (printf "%s-redis" (include "ironclip.fullname" .)) -}}
{{- end -}}

{{- define "ironclip.redisHost" -}}
{{- printf "%s-redis" (include "ironclip.fullname" .) -}}
{{- end -}}

{{/* The port in redis.url, 6379 if it names none; empty where that URL is not the one that is used. */}}
{{- define "ironclip.redisUrlPort" -}}
{{- if and .Values.redis.url (not .Values.redis.existingSecret) -}}
{{- /* Without user and path; an IPv6 address stands in brackets. */ -}}
{{- $address := regexReplaceAll "[/?#].*$" (regexReplaceAll "^rediss?://([^/?#]*@)?" .Values.redis.url "") "" -}}
{{- regexFind ":[0-9]+$" $address | trimPrefix ":" | default "6379" -}}
{{- end -}}
{{- end -}}

{{/* The port of Redis: as given, else as the URL has it, else Redis' own. */}}
{{- define "ironclip.redisPort" -}}
{{- .Values.redis.port | default (include "ironclip.redisUrlPort" .) | default 6379 | int -}}
{{- end -}}

{{/* "yes" where there may be more than one replica. */}}
{{- define "ironclip.replicated" -}}
{{- if .Values.autoscaling.enabled -}}
{{- if gt (int .Values.autoscaling.maxReplicas) 1 }}yes{{ end -}}
{{- else if gt (int .Values.replicaCount) 1 }}yes{{ end -}}
{{- end -}}

{{/* How long a pod may take to end: the drain's two parts and a margin, rounded up. */}}
{{- define "ironclip.gracePeriod" -}}
{{- int64 (ceil (addf .Values.drain.delaySeconds .Values.drain.seconds .Values.drain.marginSeconds)) -}}
{{- end -}}

{{/* Longest time for one request in milliseconds: the setting, else the service's own default. */}}
{{- define "ironclip.requestTimeout" -}}
{{- .Values.settings.request_timeout_ms | default 30000 | int64 -}}
{{- end -}}

{{/* Milliseconds of a duration such as 1m30s. */}}
{{- define "ironclip.milliseconds" -}}
{{- $factors := dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000 -}}
{{- $total := 0 -}}
{{- range regexFindAll "[0-9]+(ms|s|m|h)" . -1 -}}
{{- $number := regexFind "^[0-9]+" . -}}
{{- $total = add $total (mul ($number | int64) (get $factors (trimPrefix $number .))) -}}
{{- end -}}
{{- $total -}}
{{- end -}}

{{/* Bytes of a quantity as Kubernetes (10Gi) or Redis (512mb) writes it. */}}
{{- define "ironclip.bytes" -}}
{{- $units := dict
  "" 1 "b" 1 "kb" 1024 "mb" 1048576 "gb" 1073741824
  "m" 0.001 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "P" 1000000000000000 "E" 1000000000000000000
  "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 "Ei" 1152921504606846976
-}}
{{- $text := include "ironclip.text" . -}}
{{- $number := regexFind "^[0-9.]+" $text -}}
{{- mulf $number (get $units (trimPrefix $number $text)) | int64 -}}
{{- end -}}

{{/* A setting's value as the environment holds it. Not toString: 64 MiB would become 6.7108864e+07. */}}
{{- define "ironclip.text" -}}
{{- if kindIs "string" . }}{{ . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end -}}

{{/* An object in the order of the list, since the first encoder is the default; toJson of a dict would sort it. */}}
{{- define "ironclip.encoders" -}}
{
{{- range $index, $encoder := .Values.encoders -}}
{{ if $index }}, {{ end }}{{ toJson $encoder.name }}: {{ toJson $encoder.spec }}
{{- end -}}
}
{{- end -}}

{{/* Names of the encoders whose spec is not in a folder or in the image. */}}
{{- define "ironclip.fromHub" -}}
{{- $names := list -}}
{{- range .Values.encoders -}}
{{- $local := or (hasPrefix "/" .spec) (hasPrefix "local-dir:" .spec) (hasPrefix "random:" .spec) -}}
{{- if or (hasPrefix "hf-hub:" .spec) (and (not $local) (contains "/" .spec)) -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- end -}}
{{- join ", " $names -}}
{{- end -}}

{{/* Tolerations of a list and of the GPU's own taint. Nodes whose GPUs are handed out in parts (nvidia.com/mig-...) are
     tainted nvidia.com/gpu too. Call with (dict "tolerations" ... "gpu" "nvidia.com/gpu"). */}}
{{- define "ironclip.tolerations" -}}
{{- $all := .tolerations -}}
{{- if .gpu -}}
{{- $whole := ternary "nvidia.com/gpu" .gpu (hasPrefix "nvidia.com/" .gpu) -}}
{{- range list .gpu $whole | uniq -}}
{{- $all = append $all (dict "key" . "operator" "Exists" "effect" "NoSchedule") -}}
{{- end -}}
{{- end -}}
{{- with $all -}}
{{- toYaml . -}}
{{- end -}}
{{- end -}}

{{- define "ironclip.metricsMatcher" -}}
namespace="{{ .Release.Namespace }}",service="{{ include "ironclip.fullname" . }}-metrics"
{{- end -}}
