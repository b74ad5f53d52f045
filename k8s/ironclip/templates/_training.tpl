{{/* The training pod, the same for one node and for several. */}}

{{- define "ironclip.trainingFolder" -}}
{{- printf "%s/%s" (trimSuffix "/" .Values.training.runs.mountPath) .Values.training.run -}}
{{- end -}}

{{- define "ironclip.trainingClaim" -}}
{{- .Values.training.runs.existingClaim | default (printf "%s-runs" (include "ironclip.fullname" .)) -}}
{{- end -}}

{{/* "yes" where torchrun starts the processes. */}}
{{- define "ironclip.torchrun" -}}
{{- if or (gt (int .Values.training.nodes) 1) (gt (int .Values.training.processesPerNode) 1) }}yes{{ end -}}
{{- end -}}

{{/* JSON list of the command. torchrun takes an option that begins like one of its own for itself: hence --folder. */}}
{{- define "ironclip.trainingCommand" -}}
{{- $t := .Values.training -}}
{{- $head := list "python" "-m" "training" -}}
{{- if gt (int $t.nodes) 1 -}}
{{- /* Nodes, rank and address come as PET_* variables from the operator. */ -}}
{{- $head = list "python" "-m" "torch.distributed.run" "-m" "training" -}}
{{- else if gt (int $t.processesPerNode) 1 -}}
{{- $head = list "python" "-m" "torch.distributed.run" "--standalone" (printf "--nproc-per-node=%d" (int $t.processesPerNode)) "-m" "training" -}}
{{- end -}}
{{- concat $head (list $t.method "--config" $t.config "--folder" (include "ironclip.trainingFolder" .)) $t.overrides | toJson -}}
{{- end -}}

{{/* Call with (dict "root" $ "container" "train"). */}}
{{- define "ironclip.trainingPod" -}}
{{- $root := .root -}}
{{- $v := .root.Values -}}
{{- $t := $v.training -}}
{{- $gpu := ternary $t.gpuResource "" (gt (int $t.gpusPerNode) 0) -}}
metadata:
  labels:
    {{- /* What changes with the chart's version would start another job in the same run folder. */}}
    {{- include "ironclip.podLabels" (dict "root" $root "component" "training") | nindent 4 }}
    {{- with $t.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $t.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  restartPolicy: Never
  serviceAccountName: {{ include "ironclip.serviceAccountName" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with $v.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- toYaml $v.podSecurityContext | nindent 4 }}
  terminationGracePeriodSeconds: {{ $t.terminationGracePeriodSeconds }}
  {{- with $t.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- if and $gpu $v.gpu.runtimeClassName }}
  runtimeClassName: {{ $v.gpu.runtimeClassName }}
  {{- end }}
  {{- with $t.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "ironclip.tolerations" (dict "tolerations" $t.tolerations "gpu" $gpu) }}
  tolerations:
    {{- . | nindent 4 }}
  {{- end }}
  {{- with $t.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .container }}
      image: {{ include "ironclip.image" (dict "image" $t.image "default" $root.Chart.AppVersion) }}
      imagePullPolicy: {{ $t.image.pullPolicy }}
      command: {{ include "ironclip.trainingCommand" $root }}
      {{- with $t.extraEnvFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      env:
        - {name: HOME, value: /tmp}
        - {name: XDG_CACHE_HOME, value: /tmp/.cache}
        - {name: MPLCONFIGDIR, value: /tmp/matplotlib}
        {{- /* Weights from a hub lie with the runs, so that a restarted pod has them. */}}
        - {name: HF_HOME, value: {{ trimSuffix "/" $t.runs.mountPath }}/.cache}
        {{- if include "ironclip.torchrun" $root }}
        {{- /* torchrun would kill its processes after 30 seconds, however long the pod may take to save. */}}
        - {name: TORCH_ELASTIC_SHUTDOWN_TIMEOUT, value: {{ max 1 (sub $t.terminationGracePeriodSeconds 15) | quote }}}
        {{- end }}
        {{- if not $v.hub.enabled }}
        - {name: HF_HUB_OFFLINE, value: "1"}
        {{- end }}
        {{- if and $v.hub.enabled $v.hub.tokenSecret }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef: {name: {{ $v.hub.tokenSecret }}, key: HF_TOKEN}
        {{- end }}
        {{- with $t.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      securityContext:
        {{- toYaml $v.containerSecurityContext | nindent 8 }}
      resources:
        {{- include "ironclip.resources" (dict "resources" $t.resources "gpu" $gpu "count" $t.gpusPerNode) | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        - {name: runs, mountPath: {{ $t.runs.mountPath }}}
        {{- if $t.data.existingClaim }}
        - {name: data, mountPath: {{ $t.data.mountPath }}, readOnly: true}
        {{- end }}
        {{- with $t.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {medium: Memory, sizeLimit: {{ $t.tmp.sizeLimit }}}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $t.sharedMemory }}}
    - name: runs
      persistentVolumeClaim: {claimName: {{ include "ironclip.trainingClaim" $root }}}
    {{- if $t.data.existingClaim }}
    - name: data
      persistentVolumeClaim: {claimName: {{ $t.data.existingClaim }}, readOnly: true}
    {{- end }}
    {{- with $t.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}
